// A callback that calls a function of the guest, which may be probed itself, when it is told to; else it
// returns after a look at what it was told.
#include "../../patcher/include/stillpoint.h"

unsigned int jiffies_to_msecs(unsigned long jiffies);
void stillpoint_callback(const struct stillpoint_args *args);

__attribute__((optimize("omit-frame-pointer"))) void stillpoint_callback(const struct stillpoint_args *args) {
    if (__builtin_expect(args->data != 0, 0))
        jiffies_to_msecs(args->data);
}
