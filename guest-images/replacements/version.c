// Stands in for the kernel's version_proc_show (fs/proc/version.c): what /proc/version says.
// Built by guest-images/replacement; `seq_printf` is the guest kernel's own.
struct seq_file;
void seq_printf(struct seq_file *file, const char *format, ...);

int replacement(struct seq_file *file, void *unused);

int replacement(struct seq_file *file, void *unused) {
    (void)unused;
    seq_printf(file, "%s", "Stillpoint was here, and the kernel never stopped for long.\n");
    return 0;
}
