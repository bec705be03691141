// Stands in for the kernel's version_proc_show (fs/proc/version.c): whoever reads /proc/version
// sleeps in it for four seconds, however often it is taken out meanwhile.
struct seq_file;
void seq_putc(struct seq_file *file, char letter);
void msleep(unsigned int milliseconds);

int replacement(struct seq_file *file, void *unused);

int replacement(struct seq_file *file, void *unused) {
    (void)unused;
    msleep(4000);
    // No string: code that takes an address of its own is kept for good.
    seq_putc(file, 'z');
    seq_putc(file, '\n');
    return 0;
}
