// A callback that sees all registers and calls a function of the guest that may be probed itself.
#include "../../patcher/include/stillpoint.h"

extern int panic_timeout;
unsigned int jiffies_to_msecs(unsigned long jiffies);

void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    // The first argument of the probed function, which is on no stack, and its frame.
    int right = args->di != 0 && args->sp > args->di - (1ul << 46) && jiffies_to_msecs(args->data) != 0;
    __atomic_fetch_add(&panic_timeout, right ? 1 : 1000000, __ATOMIC_RELAXED);
}
