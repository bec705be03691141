// A callback that spends as many milliseconds as it is given in a function of the kernel's, which
// returns to it again and again.
#include "../../patcher/include/stillpoint.h"

void __const_udelay(unsigned long units);
void stillpoint_callback(const struct stillpoint_args *args);

// 1000 times 2^32 / 10^6, as in include/asm-generic/delay.h.
#define UNITS_OF_A_MILLISECOND (1000 * 0x10c7)

void stillpoint_callback(const struct stillpoint_args *args) {
    for (unsigned long i = 0; i < args->data; i++)
        __const_udelay(UNITS_OF_A_MILLISECOND);
}
