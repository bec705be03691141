// A callback that returns at once, without a frame of its own: what is left is what a call of it costs.
#include "../../patcher/include/stillpoint.h"

void stillpoint_callback(const struct stillpoint_args *args);

__attribute__((optimize("omit-frame-pointer"))) void stillpoint_callback(const struct stillpoint_args *args) {
    (void)args;
}
