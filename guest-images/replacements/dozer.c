// A callback that sleeps for two seconds.
#include "../../patcher/include/stillpoint.h"

STILLPOINT_CALLBACK(STILLPOINT_MAY_SLEEP | STILLPOINT_NEEDS_RCU);

void msleep(unsigned int milliseconds);
void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    msleep((unsigned int)args->data);
}
