// The same as belongs_one.c with a mark of its own, for several callbacks on one site; it is given
// registers too, and is skipped in non-maskable interrupts.
#include "../../patcher/include/stillpoint.h"

#define OWN 2ul
STILLPOINT_CALLBACK(0);
#include "belongs_one.c"
