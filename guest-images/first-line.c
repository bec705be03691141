// The init of guests whose boot is timed: one line, then nothing. The kernel has opened the console.
#include <unistd.h>

int main(void) {
    static const char line[] = "stillpoint guest: first line\n";
    if (write(1, line, sizeof line - 1) < 0)
        return 1;
    for (;;)
        pause();
}
