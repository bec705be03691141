//! RAM with page tables that a test fills as it likes.

use crate::guest::{
    Activity, Gpa, GuestMemory, Gva, MemoryImage, StoppedGuest, Vcpu, VcpuRegisters,
};
use crate::space::{Root, walk};

const PAGE: u64 = 0x1000;
const TABLES: u64 = 0x1000;

/// A page table entry leads somewhere.
pub const PRESENT: u64 = 1;
/// It may be written through.
pub const WRITABLE: u64 = 2;
/// User mode may go through.
pub const USER: u64 = 4;
/// Its translation survives a change of CR3.
pub const GLOBAL: u64 = 1 << 8;
/// Nothing behind it is executed.
pub const NO_EXECUTE: u64 = 1 << 63;

/// A place that was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Where it is.
    pub gpa: Gpa,
    /// How it is reached; none for an entry of a page table.
    pub gva: Option<Gva>,
}

/// Four-level page tables and memory behind them.
#[derive(Clone, Debug)]
pub struct FakeGuest {
    /// RAM from address 0 on, and the vCPUs.
    pub image: MemoryImage,
    /// The top-level table.
    pub root: Gpa,
    /// The first page that nothing uses yet.
    next: u64,
    /// Every number and pointer that was written, and every entry of a page table.
    pub places: Vec<Place>,
}

impl FakeGuest {
    /// A guest of `ram` bytes in which nothing is mapped.
    #[must_use]
    pub fn new(ram: usize) -> Self {
        let image = MemoryImage::new(vec![(Gpa(0), vec![0; ram])], Vec::new()).unwrap();
        Self {
            image,
            root: Gpa(TABLES),
            // The page after the root stays free: it is the root's partner under isolation.
            next: TABLES + 2 * PAGE,
            places: Vec::new(),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += PAGE;
        self.next - PAGE
    }

    /// The table entry for `at` at `level`, making the tables above it as needed.
    pub fn entry(&mut self, at: Gva, level: u8) -> Gpa {
        let mut table = self.root;
        let mut now = 4;
        loop {
            let slot = table.offset((at.0 >> (12 + 9 * u32::from(now - 1)) & 0x1ff) * 8);
            if now == level {
                return slot;
            }
            let raw = self.image.read_u64(slot).unwrap();
            table = if raw & PRESENT == 0 {
                let fresh = self.fresh();
                self.set(slot, fresh | PRESENT | WRITABLE | USER);
                Gpa(fresh)
            } else {
                Gpa(raw & 0x000f_ffff_ffff_f000)
            };
            now -= 1;
        }
    }

    /// Writes a word of physical memory.
    pub fn set(&mut self, at: Gpa, value: u64) {
        self.places.push(Place { gpa: at, gva: None });
        self.image.write(at, &value.to_le_bytes()).unwrap();
    }

    /// Maps one 4 KiB page at `at` to fresh memory.
    pub fn page(&mut self, at: Gva, flags: u64) -> Gpa {
        let slot = self.entry(at, 1);
        let gpa = self.fresh();
        self.set(slot, gpa | PRESENT | flags);
        Gpa(gpa)
    }

    /// Maps fresh memory from `at` on, at least `len` bytes.
    pub fn map(&mut self, at: Gva, len: u64, flags: u64) {
        let first = at.0 & !(PAGE - 1);
        let last = (at.0 + (len - 1)) & !(PAGE - 1);
        for page in (first..=last).step_by(PAGE as usize) {
            self.page(Gva(page), flags);
        }
    }

    /// Where the page tables say that `at` is.
    #[must_use]
    pub fn gpa(&self, at: Gva) -> Gpa {
        walk(&self.image, self.root(), at).unwrap().gpa
    }

    /// Writes where the page tables say.
    pub fn put(&mut self, at: Gva, bytes: &[u8]) {
        let (mut at, mut rest) = (at, bytes);
        self.places.push(Place {
            gpa: self.gpa(at),
            gva: Some(at),
        });
        while !rest.is_empty() {
            let left = (PAGE - at.0 % PAGE) as usize;
            let (now, later) = rest.split_at(left.min(rest.len()));
            let gpa = self.gpa(at);
            self.image.write(gpa, now).unwrap();
            at = at.offset(now.len() as u64);
            rest = later;
        }
    }

    /// Writes a number of 64 bits, or a pointer.
    pub fn put_u64(&mut self, at: Gva, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// The top-level table.
    #[must_use]
    pub fn root(&self) -> Root {
        Root {
            table: self.root,
            levels: 4,
        }
    }

    /// A vCPU in the kernel with these tables.
    pub fn add_vcpu(&mut self, adjust: impl FnOnce(&mut Vcpu)) {
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

/// Registers of a vCPU in a 64-bit kernel.
#[must_use]
pub fn kernel_registers(root: Gpa) -> VcpuRegisters {
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
