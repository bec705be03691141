// A callback that keeps its CPU to itself for so many millions of cycles as it is given: whoever calls
// it never schedules meanwhile.
#include "../../patcher/include/stillpoint.h"

void stillpoint_callback(const struct stillpoint_args *args);

static inline unsigned long cycles(void) {
    unsigned int low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (unsigned long)high << 32 | low;
}

void stillpoint_callback(const struct stillpoint_args *args) {
    unsigned long end = cycles() + args->data * 1000000;
    while (cycles() < end)
        __asm__ volatile("pause");
}
