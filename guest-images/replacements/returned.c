// A callback at the return of a function: adds 1 to a number that the guest shows in
// /proc/sys/kernel/panic where it sees what the function's caller will see, else a million.
#include "../../patcher/include/stillpoint.h"

extern int panic_timeout;
unsigned int jiffies_to_msecs(unsigned long jiffies);

void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    // The stack pointer is as at the entry: there stands where it returns to, in the kernel's text.
    unsigned long returns_to = *(const unsigned long *)args->sp;
    int right = args->ax == args->data && returns_to >= 0xffffffff80000000ul && jiffies_to_msecs(1) != 0;
    __atomic_fetch_add(&panic_timeout, right ? 1 : 1000000, __ATOMIC_RELAXED);
}
