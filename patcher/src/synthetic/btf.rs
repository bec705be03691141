//! Writes type information in BTF, version 1.

/// Type information to write. Every method returns the number of the new type.
#[derive(Clone, Debug, Default)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Btf {
    /// No types yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            types: Vec::new(),
            strings: vec![0],
            count: 0,
        }
    }

    /// The offset of a string.
    pub fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(text.bytes());
        self.strings.push(0);
        at
    }

    /// Any record: its name, kind, flag, number of members, size or type, and what follows it.
    pub fn record(
        &mut self,
        name: &str,
        (kind, flag, members): (u32, bool, u32),
        size_or_type: u32,
        extra: &[u32],
    ) -> u32 {
        let name = self.string(name);
        let info = u32::from(flag) << 31 | kind << 24 | members;
        for word in [name, info, size_or_type].iter().chain(extra) {
            self.types.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    /// An unsigned integer of `size` bytes.
    pub fn int(&mut self, name: &str, size: u32) -> u32 {
        self.record(name, (1, false, 0), size, &[size * 8])
    }

    /// A pointer.
    pub fn pointer(&mut self, to: u32) -> u32 {
        self.record("", (2, false, 0), to, &[])
    }

    /// An array.
    pub fn array(&mut self, of: u32, index: u32, count: u32) -> u32 {
        self.record("", (3, false, 0), 0, &[of, index, count])
    }

    /// A typedef.
    pub fn typedef(&mut self, name: &str, of: u32) -> u32 {
        self.record(name, (8, false, 0), of, &[])
    }

    /// A qualifier or tag: 9 volatile, 10 const, 11 restrict, 18 type tag.
    pub fn qualifier(&mut self, kind: u32, of: u32) -> u32 {
        self.record("", (kind, false, 0), of, &[])
    }

    /// A function that takes and returns these types; 0 is `void`, and as the last parameter `...`.
    pub fn function(&mut self, name: &str, returns: u32, parameters: &[u32]) -> u32 {
        let extra: Vec<_> = parameters.iter().flat_map(|kind| [0, *kind]).collect();
        let members = (13, false, parameters.len() as u32);
        let prototype = self.record("", members, returns, &extra);
        self.record(name, (12, false, 1), prototype, &[])
    }

    /// A structure of (name, type, bit offset) members.
    pub fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        self.composite(4, false, name, size, members)
    }

    /// A union of (name, type, bit offset) members.
    pub fn union(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        self.composite(5, false, name, size, members)
    }

    /// A structure whose offsets hold the width of bit fields in their upper 8 bits.
    pub fn packed(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        self.composite(4, true, name, size, members)
    }

    fn composite(
        &mut self,
        kind: u32,
        flag: bool,
        name: &str,
        size: u32,
        members: &[(&str, u32, u32)],
    ) -> u32 {
        let mut extra = Vec::new();
        for &(name, of, at) in members {
            extra.extend([self.string(name), of, at]);
        }
        self.record(name, (kind, flag, members.len() as u32), size, &extra)
    }

    /// The whole blob.
    #[must_use]
    pub fn write(&self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let header = [24, 0, types, types, strings]
            .map(u32::to_le_bytes)
            .concat();
        [&[0x9f, 0xeb, 1, 0], &header[..], &self.types, &self.strings].concat()
    }

    /// The whole blob, with a layout section: for each kind from 0 on, the bytes behind its record
    /// and those for each member.
    #[must_use]
    pub fn write_with_layout(&self, kinds: &[(u8, u8)]) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let layout: Vec<u8> = kinds
            .iter()
            .flat_map(|&(fixed, each)| [fixed, each, 0, 0])
            .collect();
        let len = layout.len() as u32;
        let header = [32, 0, types, types + len, strings, types, len]
            .map(u32::to_le_bytes)
            .concat();
        [
            &[0x9f, 0xeb, 1, 0],
            &header[..],
            &self.types,
            &layout,
            &self.strings,
        ]
        .concat()
    }

    /// One type of every kind, with structures that use them in every way.
    #[must_use]
    pub fn example() -> Self {
        let mut btf = Self::new();
        let int = btf.int("unsigned int", 4);
        let long = btf.int("unsigned long", 8);
        let byte = btf.int("unsigned char", 1);
        let pointer = btf.pointer(0);
        let text = btf.array(byte, int, 16);
        let spinlock = btf.structure("spinlock", 4, &[("raw", int, 0)]);
        let lock = btf.typedef("spinlock_t", spinlock);
        let constant = btf.qualifier(10, lock);
        let volatile = btf.qualifier(9, constant);
        let tag = btf.qualifier(18, volatile);
        let restrict = btf.qualifier(11, pointer);
        let state = btf.union("", 8, &[("state", int, 0), ("whole", long, 0)]);
        let inner = btf.structure("", 16, &[("", state, 0), ("next", restrict, 64)]);
        let memory = btf.structure("memory", 16, &[("base", pointer, 0), ("size", int, 64)]);
        let memories = btf.array(memory, int, 7);
        let open = btf.array(long, int, 0);
        btf.structure(
            "task",
            160,
            &[
                ("lock", tag, 0),
                ("", inner, 64),
                ("name", text, 192),
                ("mem", memories, 320),
                ("tail", open, 1280),
            ],
        );
        let bit = |width: u32, at: u32| width << 24 | at;
        btf.packed(
            "flags",
            8,
            &[
                ("one", int, bit(1, 0)),
                ("two", int, bit(3, 7)),
                ("rest", long, 32),
                ("lock", lock, 32),
            ],
        );
        // Narrow integers, as bit fields were written before the flag.
        let narrow = btf.record("unsigned int", (1, false, 0), 4, &[2 << 16 | 5]);
        btf.structure("old_flags", 4, &[("first", narrow, 8)]);
        let states: Vec<u32> = ["BOOTING", "RUNNING"].map(|name| btf.string(name)).into();
        btf.record(
            "states",
            (6, true, 2),
            4,
            &[states[0], u32::MAX, states[1], 3],
        );
        let wide = btf.string("WIDE");
        btf.record("wide", (19, false, 1), 8, &[wide, 1, 2]);
        btf.record("unknown", (7, false, 0), 0, &[]);
        let argument = btf.string("argument");
        let prototype = btf.record("", (13, false, 1), int, &[argument, int]);
        let function = btf.record("function", (12, false, 1), prototype, &[]);
        let variable = btf.record("variable", (14, false, 0), int, &[1]);
        btf.record(".data..percpu", (15, false, 1), 64, &[variable, 0, 4]);
        btf.record("float", (16, false, 0), 4, &[]);
        btf.record("tagged", (17, false, 0), function, &[u32::MAX]);
        // Two different types of one name.
        btf.structure("twice", 8, &[("same", int, 0), ("moved", int, 32)]);
        btf.structure("twice", 12, &[("same", int, 0), ("moved", int, 64)]);
        btf
    }
}
