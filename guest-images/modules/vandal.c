// SPDX-License-Identifier: GPL-2.0
// Does to its own kernel whatever it is told to, for tests of whoever looks after that kernel from
// outside.
//
//   echo COMMAND >/sys/module/vandal/parameters/do
//   cat /sys/module/vandal/parameters/do            what the last one has found
//
//   read ADDRESS              eight bytes
//   write ADDRESS HEX         bytes, whether or not the page may be written
//   fill ADDRESS LENGTH WORD  words of eight bytes, all alike; WORD 0 makes each another one; the page may
//                             be written
//   entry ADDRESS             the page table entry that maps it
//   map ADDRESS ENTRY         another one in its place, on every CPU
//   back                      what was there before the last of these
//   double ADDRESS            the 2 MB that it is in are a copy of themselves from now on; finds the entry
//                             that was there
//   scribble ADDRESS COUNT    writes so often as fast as it can, and takes whatever comes of it
#include <asm/pgtable.h>
#include <asm/tlbflush.h>
#include <linux/gfp.h>
#include <linux/hex.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/sysfs.h>

MODULE_DESCRIPTION("Rewrites its own kernel");
MODULE_LICENSE("GPL");

#define MOST 64
#define WRITE_PROTECT (1ul << 16)
#define GLOBAL_PAGES (1ul << 7)

static u64 found;
static pte_t *mapped;
static u64 before;

// The kernel's own write_cr0() keeps write protection on.
static unsigned long unprotect(void) {
    unsigned long cr0;

    asm volatile("mov %%cr0, %0" : "=r"(cr0));
    asm volatile("mov %0, %%cr0" ::"r"(cr0 & ~WRITE_PROTECT) : "memory");
    return cr0;
}

static void protect(unsigned long cr0) {
    asm volatile("mov %0, %%cr0" ::"r"(cr0) : "memory");
}

static void put(void *to, const void *from, size_t length) {
    unsigned long flags, cr0;

    local_irq_save(flags);
    cr0 = unprotect();
    memcpy(to, from, length);
    protect(cr0);
    local_irq_restore(flags);
}

// All of it, what is mapped for every address space too.
static void flush(void *nothing) {
    unsigned long cr4;

    asm volatile("mov %%cr4, %0" : "=r"(cr4));
    asm volatile("mov %0, %%cr4" ::"r"(cr4 & ~GLOBAL_PAGES) : "memory");
    asm volatile("mov %0, %%cr4" ::"r"(cr4) : "memory");
}

static int change(pte_t *pte, u64 entry) {
    mapped = pte;
    found = before = pte_val(*pte);
    put(pte, &entry, sizeof entry);
    on_each_cpu(flush, NULL, 1);
    return 0;
}

static int map(unsigned long at, u64 entry) {
    unsigned int level;
    pte_t *pte = lookup_address(at, &level);

    return pte ? change(pte, entry) : -ENOENT;
}

static int entry_of(unsigned long at) {
    unsigned int level;
    pte_t *pte = lookup_address(at, &level);

    if (!pte)
        return -ENOENT;
    found = pte_val(*pte);
    return 0;
}

static int double_it(unsigned long at) {
    unsigned int level;
    unsigned long flags;
    pte_t *pte = lookup_address(at, &level);
    void *copy;
    u64 old;

    if (!pte || level != PG_LEVEL_2M)
        return -ENOENT;
    // Never given back.
    copy = (void *)__get_free_pages(GFP_KERNEL, PMD_SHIFT - PAGE_SHIFT);
    if (!copy)
        return -ENOMEM;
    old = pte_val(*pte);
    local_irq_save(flags);
    memcpy(copy, (void *)(at & PMD_MASK), PMD_SIZE);
    local_irq_restore(flags);
    return map(at, (old & ~PHYSICAL_PMD_PAGE_MASK) | __pa(copy));
}

static int fill(unsigned long at, u64 length, u64 word) {
    u64 state = 88172645463325252ull;

    for (; length >= sizeof word; length -= sizeof word, at += sizeof word) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *(volatile u64 *)at = word ? word : state;
    }
    return 0;
}

static int scribble(unsigned long at, u64 count) {
    unsigned long flags, cr0;

    local_irq_save(flags);
    cr0 = unprotect();
    for (; count; count--)
        *(volatile u64 *)(at + count % 512 * 8) = count;
    protect(cr0);
    local_irq_restore(flags);
    return 0;
}

static int told(const char *text, const struct kernel_param *param) {
    static char verb[16], hex[2 * MOST + 1];
    static u8 bytes[MOST];
    u64 at = 0, first = 0, second = 0;
    int words;

    hex[0] = 0;
    if (sscanf(text, "write %llx %128s", &at, hex) == 2) {
        size_t length = strlen(hex) / 2;

        if (hex2bin(bytes, hex, length))
            return -EINVAL;
        put((void *)at, bytes, length);
        return 0;
    }
    if (sysfs_streq(text, "back"))
        return mapped ? change(mapped, before) : -ENOENT;
    words = sscanf(text, "%15s %llx %llx %llx", verb, &at, &first, &second);
    if (words == 2 && !strcmp(verb, "read")) {
        found = *(volatile u64 *)at;
        return 0;
    }
    if (words == 2 && !strcmp(verb, "entry"))
        return entry_of(at);
    if (words == 2 && !strcmp(verb, "double"))
        return double_it(at);
    if (words == 3 && !strcmp(verb, "map"))
        return map(at, first);
    if (words == 3 && !strcmp(verb, "scribble"))
        return scribble(at, first);
    if (words == 4 && !strcmp(verb, "fill"))
        return fill(at, first, second);
    return -EINVAL;
}

static int tell(char *text, const struct kernel_param *param) {
    return sysfs_emit(text, "%llx\n", found);
}

static const struct kernel_param_ops ops = {.set = told, .get = tell};
module_param_cb(do, &ops, NULL, 0600);

static int __init begin(void) {
    return 0;
}

static void __exit end(void) {
}

module_init(begin);
module_exit(end);
