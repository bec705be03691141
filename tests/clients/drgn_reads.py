"""Run by drgn: reads the guest kernel's banner and what it told about itself for crash dumps.

The address comes from the guest: without debugging symbols drgn knows none of a stock kernel.
"""

import sys

print(prog.read_c_string(int(sys.argv[1], 16)).decode().strip())  # noqa: F821 (drgn defines prog)
print(prog["UTS_RELEASE"].string_().decode())  # noqa: F821
