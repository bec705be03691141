/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What a callback of a probe is given, and how it says what it needs.
 *
 *	#include "stillpoint.h"
 *
 *	STILLPOINT_CALLBACK(STILLPOINT_NMI);
 *
 *	void stillpoint_callback(const struct stillpoint_args *args)
 *	{
 *		...
 *	}
 *
 * Compile it as kernel code, into a relocatable object:
 *
 *	gcc -c -O2 -mcmodel=kernel -fno-pic -mno-red-zone -mgeneral-regs-only -fno-stack-protector \
 *	    -fcf-protection=none -fno-asynchronous-unwind-tables -ffreestanding callback.c
 *
 * It is called before the instruction at the site, with the flags of the site but for DF, which is
 * clear in the kernel. For a probe with --return it is called when the function has returned, before
 * its caller goes on. All registers are then as the caller will find them: ax is the value that is
 * returned, and dx the second half where there is one. Only sp is what it was at the function's entry,
 * which tells which call it was; there stands where the function returns to.
 *
 * It may call functions of the guest's kernel by their names. What it changes below `data` is
 * undefined. Accepted relocations: R_X86_64_64, _32, _32S, _PC32, _PLT32, _PC64.
 * Sections that the guest's kernel would have to know (__ex_table, __bug_table, .altinstructions,
 * __jump_table, .static_call_sites, ...) are refused by name.
 */
#ifndef STILLPOINT_H
#define STILLPOINT_H

/* As seen before the instruction at the site runs, or after the function has returned. */
struct stillpoint_args {
	unsigned long data; /* as given with --data */
	unsigned long site; /* address of the probed instruction, for a return as well */
	/* Not there for a callback that declares STILLPOINT_NO_REGISTERS. */
	unsigned long sp;
	unsigned long r15, r14, r13, r12, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long flags;
	unsigned long bp;
};

/* It may sleep: it is skipped, and counted as skipped, where the guest may not. */
#define STILLPOINT_MAY_SLEEP 1u
/* It uses RCU: it is skipped where RCU is not watching. */
#define STILLPOINT_NEEDS_RCU 2u
/* It may run in a non-maskable interrupt; without this it is skipped there. */
#define STILLPOINT_NMI 4u
/* It looks at `data` and `site` only, which makes it cheaper at a function's entry and return. */
#define STILLPOINT_NO_REGISTERS 8u

#define STILLPOINT_VERSION 1u

/* At most once in an object. */
#define STILLPOINT_CALLBACK(flags)                                                     \
	static const unsigned int stillpoint_declaration[2]                            \
		__attribute__((used, section(".stillpoint"))) = { STILLPOINT_VERSION,  \
								  (flags) }

#endif
