//! A guest for tests: RAM with page tables that a test fills as it likes.

use super::{Activity, Gpa, Gva, MemoryImage, StoppedGuest, Vcpu, VcpuRegisters};
use crate::guest::GuestMemory;

const TABLES: u64 = 0x1000;
/// Where data pages begin; tables grow up to here.
const DATA: u64 = 0x10_0000;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 2;
pub(crate) const USER: u64 = 4;
pub(crate) const GLOBAL: u64 = 1 << 8;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;

/// Four-level page tables and memory behind them.
pub(crate) struct FakeGuest {
    pub(crate) image: MemoryImage,
    pub(crate) root: Gpa,
    next_table: u64,
    next_data: u64,
}

impl FakeGuest {
    pub(crate) fn new(ram: usize) -> Self {
        let image = MemoryImage::new(vec![(Gpa(0), vec![0; ram])], Vec::new()).unwrap();
        Self {
            image,
            root: Gpa(TABLES),
            // The page after the root stays free: it is the root's partner under isolation.
            next_table: TABLES + 0x2000,
            next_data: DATA,
        }
    }

    /// The table entry for `at` at `level`, making the tables above it as needed.
    pub(crate) fn entry(&mut self, at: Gva, level: u8) -> Gpa {
        let mut table = self.root;
        let mut now = 4;
        loop {
            let slot = table.offset((at.0 >> (12 + 9 * u32::from(now - 1)) & 0x1ff) * 8);
            if now == level {
                return slot;
            }
            let raw = self.image.read_u64(slot).unwrap();
            table = if raw & PRESENT == 0 {
                let fresh = self.next_table;
                self.next_table += 0x1000;
                assert!(fresh < DATA);
                self.set(slot, fresh | PRESENT | WRITABLE | USER);
                Gpa(fresh)
            } else {
                Gpa(raw & 0x000f_ffff_ffff_f000)
            };
            now -= 1;
        }
    }

    pub(crate) fn set(&mut self, at: Gpa, value: u64) {
        self.image.write(at, &value.to_le_bytes()).unwrap();
    }

    /// Maps one 4 KiB page at `at` to fresh memory.
    pub(crate) fn page(&mut self, at: Gva, flags: u64) -> Gpa {
        let slot = self.entry(at, 1);
        let gpa = self.next_data;
        self.next_data += 0x1000;
        self.set(slot, gpa | PRESENT | flags);
        Gpa(gpa)
    }

    /// Maps fresh memory from `at` on, at least `len` bytes.
    pub(crate) fn map(&mut self, at: Gva, len: u64, flags: u64) {
        let first = at.0 & !0xfff;
        let last = (at.0 + (len - 1)) & !0xfff;
        for page in (first..=last).step_by(0x1000) {
            self.page(Gva(page), flags);
        }
    }

    /// Writes where the page tables say.
    pub(crate) fn put(&mut self, at: Gva, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            let mapping = crate::space::walk(
                &self.image,
                crate::space::Root {
                    table: self.root,
                    levels: 4,
                },
                at.offset(i as u64),
            )
            .unwrap();
            self.image.write(mapping.gpa, &[*byte]).unwrap();
        }
    }

    pub(crate) fn put_u64(&mut self, at: Gva, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn root(&self) -> crate::space::Root {
        crate::space::Root {
            table: self.root,
            levels: 4,
        }
    }

    /// A vCPU in the kernel with these tables.
    pub(crate) fn add_vcpu(&mut self, adjust: impl FnOnce(&mut Vcpu)) {
        let mut vcpu = Vcpu {
            index: u32::try_from(self.image.vcpus().len()).unwrap(),
            activity: Activity::Running,
            registers: kernel_registers(self.root),
            nested: false,
            reinjects: false,
        };
        adjust(&mut vcpu);
        self.image.vcpus_mut().push(vcpu);
    }
}

pub(crate) fn kernel_registers(root: Gpa) -> VcpuRegisters {
    VcpuRegisters {
        cr0: 0x8005_0033,
        cr3: root.0,
        cr4: 0x20,
        efer: 0xd01,
        cs: 0x10,
        ss: 0x18,
        ..VcpuRegisters::default()
    }
}
