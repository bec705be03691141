use super::layout::{
    ExportFields, KallsymsFields, OrcFields, Part, States, SymbolFields, TypesFields,
};
use super::*;
use crate::guest::fake::FakeGuest;
use crate::guest::{Gpa, LinkAddr, Slide};
use crate::space::{Located, PerCpu};
use crate::types::Field;

const SLIDE: Slide = Slide(0x20_0000);
const HEAD: LinkAddr = LinkAddr(0xffff_ffff_8200_0000);
const TYPES: LinkAddr = LinkAddr(0xffff_ffff_8200_0100);
const HEAP: Gva = Gva(0xffff_ffff_c000_0000);
const HEAP_SIZE: u64 = 0x2_0000;
/// `sizeof(struct module)` here.
const SIZE: u64 = 0x200;

const fn field(offset: u64, size: u64) -> Field {
    Field {
        offset,
        size,
        bits: None,
        pointer: false,
    }
}

const fn part(kind: MemoryKind, base: u64, start: Option<Field>, end: Field) -> Part {
    Part {
        kind,
        base: field(base, 8),
        start,
        end,
    }
}

fn layout() -> ModulesLayout {
    ModulesLayout {
        head: HEAD,
        next: 0,
        size: 0x200,
        list: 0x10,
        state: field(0, 4),
        states: States {
            live: 0,
            coming: 1,
            going: 2,
            unformed: 3,
        },
        name: field(0x20, 56),
        users: Some(field(0x60, 4)),
        taints: Some(field(0x68, 8)),
        source_version: Some(field(0x70, 8)),
        memory: vec![
            part(MemoryKind::Text, 0x80, None, field(0x88, 4)),
            part(MemoryKind::Data, 0x80, Some(field(0x88, 4)), field(0x8c, 4)),
            part(MemoryKind::InitText, 0x90, None, field(0x98, 4)),
        ],
        orc: Some(OrcFields {
            count: field(0xa0, 4),
            instructions: field(0xa8, 8),
            entries: field(0xb0, 8),
        }),
        kallsyms: Some(KallsymsFields {
            pointer: field(0xb8, 8),
            size: 0x20,
            symbols: field(0, 8),
            count: field(8, 4),
            strings: field(0x10, 8),
            kinds: field(0x18, 8),
            entry: SymbolFields {
                len: 24,
                name: field(0, 4),
                value: field(8, 8),
                size: field(16, 8),
                section: field(6, 2),
            },
        }),
        exports: Some(ExportFields {
            array: field(0xc0, 8),
            count: field(0xc8, 4),
            len: 12,
            value: field(0, 4),
            name: field(4, 4),
        }),
        types: Some(TypesFields {
            head: TYPES,
            list: 8,
            module: 0,
            btf: 0x18,
            data: 0,
            size: field(8, 4),
        }),
    }
}

/// Name, type letter, section, value, size.
type Row = (&'static str, u8, u16, u64, u64);

struct Guest {
    fake: FakeGuest,
    located: Located,
    layout: ModulesLayout,
    next: u64,
    last: Gva,
}

impl Guest {
    fn new() -> Self {
        let mut fake = FakeGuest::new(0x200_0000);
        fake.map(HEAD.at(SLIDE), 0x1000, 0);
        fake.map(HEAP, HEAP_SIZE, 0);
        let head = HEAD.at(SLIDE);
        fake.put_u64(head, head.0);
        let types = TYPES.at(SLIDE);
        fake.put_u64(types, types.0);
        let located = Located {
            slide: SLIDE,
            root: fake.root(),
            phys_base: Gpa(0),
            page_offset_base: None,
            per_cpu: PerCpu::none(),
            bounds: crate::space::Bounds::USUAL,
        };
        Self {
            fake,
            located,
            layout: layout(),
            next: 0,
            last: head,
        }
    }

    fn alloc(&mut self, len: u64) -> Gva {
        let at = HEAP.offset(self.next);
        self.next += len.next_multiple_of(0x100);
        assert!(self.next <= HEAP_SIZE);
        at
    }

    fn put_u32(&mut self, at: Gva, value: u32) {
        self.fake.put(at, &value.to_le_bytes());
    }

    /// Puts a live module at the end of the list.
    fn module(&mut self, name: &str) -> Gva {
        let at = self.alloc(SIZE);
        self.fake.put(at.offset(0x20), name.as_bytes());
        self.put_u32(at.offset(0x60), 3);
        let text = self.alloc(0x300);
        self.fake.put_u64(at.offset(0x80), text.0);
        self.put_u32(at.offset(0x88), 0x200);
        self.put_u32(at.offset(0x8c), 0x300);
        let node = at.offset(0x10);
        let head = HEAD.at(SLIDE);
        self.fake.put_u64(self.last, node.0);
        self.fake.put_u64(node, head.0);
        self.last = node;
        at
    }

    fn symbols_of(&mut self, module: Gva, rows: &[Row]) -> Gva {
        let table = self.alloc(0x20);
        let symbols = self.alloc(24 * rows.len() as u64);
        let strings = self.alloc(0x200);
        let kinds = self.alloc(rows.len() as u64);
        let mut end = 1;
        for (index, (name, kind, section, value, size)) in rows.iter().enumerate() {
            let at = symbols.offset(24 * index as u64);
            if !name.is_empty() {
                self.put_u32(at, end);
                self.fake.put(strings.offset(end.into()), name.as_bytes());
                end += u32::try_from(name.len()).unwrap() + 1;
            }
            self.fake.put(at.offset(6), &section.to_le_bytes());
            self.fake.put_u64(at.offset(8), *value);
            self.fake.put_u64(at.offset(16), *size);
            self.fake.put(kinds.offset(index as u64), &[*kind]);
        }
        for (offset, value) in [(0, symbols.0), (0x10, strings.0), (0x18, kinds.0)] {
            self.fake.put_u64(table.offset(offset), value);
        }
        self.put_u32(table.offset(8), u32::try_from(rows.len()).unwrap());
        self.fake.put_u64(module.offset(0xb8), table.0);
        table
    }

    fn modules(&self) -> Result<Vec<Module>, ModulesError> {
        let space = self.located.space(&self.fake.image);
        self.layout.modules(&space, &self.located)
    }

    fn symbols(&self) -> Result<ModuleSymbols, ModulesError> {
        let space = self.located.space(&self.fake.image);
        self.layout.symbols(&space, &self.modules()?[0])
    }

    fn unsettled(&self) -> Option<String> {
        let space = self.located.space(&self.fake.image);
        self.layout.unsettled(&space, &self.located).unwrap()
    }
}

#[test]
fn modules_are_told_with_their_memory() {
    let mut guest = Guest::new();
    assert_eq!(guest.modules(), Ok(Vec::new()));
    let one = guest.module("one");
    let two = guest.module("two");
    let text = guest.located.space(&guest.fake.image);
    let text = text.read_u64(two.offset(0x80)).unwrap();
    let source = guest.alloc(0x10);
    guest.fake.put(source, b"0123456789ABCDEF");
    guest.fake.put_u64(two.offset(0x70), source.0);
    guest.put_u32(two.offset(0xa0), 7);
    guest.fake.put_u64(two.offset(0xa8), 0x1000);
    guest.fake.put_u64(two.offset(0xb0), 0x2000);
    let modules = guest.modules().unwrap();
    assert_eq!(modules[0].address, one);
    assert_eq!(
        modules[1],
        Module {
            address: two,
            name: "two".into(),
            state: ModuleState::Live,
            memory: vec![
                ModuleMemory {
                    kind: MemoryKind::Text,
                    base: Gva(text),
                    size: 0x200
                },
                ModuleMemory {
                    kind: MemoryKind::Data,
                    base: Gva(text + 0x200),
                    size: 0x100
                },
            ],
            users: 2,
            taints: 0,
            source_version: Some("0123456789ABCDEF".into()),
            symbols: None,
            exports: None,
            orc: Some(OrcTables {
                instructions: Gva(0x1000),
                entries: Gva(0x2000),
                count: 7
            }),
            types: None,
        }
    );
    assert_eq!(modules[1].size(), 0x300);
    assert!(modules[1].contains(Gva(text + 0x2ff)));
    assert!(!modules[1].contains(Gva(text + 0x300)));
    assert_eq!(
        modules[1].text().collect::<Vec<_>>(),
        [Gva(text)..Gva(text + 0x200)]
    );
}

#[test]
fn a_module_on_its_way_is_told() {
    let mut guest = Guest::new();
    guest.module("one");
    assert_eq!(guest.unsettled(), None);
    let two = guest.module("two");
    for (raw, state) in [
        (1, ModuleState::Coming),
        (2, ModuleState::Going),
        (3, ModuleState::Unformed),
        (9, ModuleState::Unknown(9)),
    ] {
        guest.put_u32(two, raw);
        assert_eq!(guest.unsettled().as_deref(), Some("two"));
        assert_eq!(guest.modules().unwrap()[1].state, state);
    }
    // Whatever its tables are, they are not looked at before it is formed.
    guest.put_u32(two, 3);
    guest.fake.put_u64(two.offset(0xb8), 1);
    guest.fake.put_u64(two.offset(0x70), 1);
    assert!(guest.modules().is_ok());
}

#[test]
fn symbols_are_those_that_the_kernel_shows() {
    let mut guest = Guest::new();
    let one = guest.module("one");
    guest.symbols_of(
        one,
        &[
            ("", b'U', 0, 0, 0),
            ("__pfx_f", b't', 1, 0xf0, 16),
            ("f", b't', 1, 0x100, 0x20),
            ("printk", b'U', 0, 0, 0),
            ("g", b'T', 1, 0x140, 0x10),
            ("data", b'd', 2, 0x300, 8),
        ],
    );
    let symbols = guest.symbols().unwrap();
    let rows: Vec<_> = symbols.iter().map(|s| (s.kind(), s.name())).collect();
    let expected = [('t', "__pfx_f"), ('t', "f"), ('t', "g"), ('d', "data")];
    assert_eq!(rows, expected.map(|(kind, name)| (kind, name.to_owned())));
    assert!(!symbols.iter().next().unwrap().is_function());
    let (symbol, next) = symbols.below(Gva(0x13f)).unwrap();
    assert_eq!((symbol.name().as_str(), next), ("f", Some(Gva(0x140))));
    assert!(symbols.below(Gva(0xef)).is_none());
    assert_eq!(symbols.named("g").count(), 1);
}

#[test]
fn exported_symbols_have_capital_letters() {
    let mut guest = Guest::new();
    let one = guest.module("one");
    let f = HEAP.0 + 0x1_0000;
    let table = [("", 0, 0, 0, 0), ("f", b't', 1, f, 1), ("g", b't', 1, f, 1)];
    guest.symbols_of(one, &table);
    let export = guest.alloc(0x40);
    guest.fake.put(export.offset(0x20), b"f\0");
    guest.put_u32(export, u32::try_from(f - export.0).unwrap());
    guest.put_u32(export.offset(4), 0x1c);
    guest.fake.put_u64(one.offset(0xc0), export.0);
    guest.put_u32(one.offset(0xc8), 1);
    let symbols = guest.symbols().unwrap();
    let kinds: String = symbols.iter().map(|symbol| symbol.kind()).collect();
    assert_eq!(kinds, "Tt");
}

#[test]
fn a_list_in_a_circle_is_an_error() {
    let mut guest = Guest::new();
    let one = guest.module("one");
    guest.module("two");
    guest.fake.put_u64(guest.last, one.offset(0x10).0);
    assert!(matches!(guest.modules(), Err(ModulesError::Circle { .. })));
}

#[test]
fn what_cannot_be_is_an_error() {
    // Every number of a module, in turn.
    for offset in [0x8c, 0x98, 0xa0, 0xc8] {
        let mut guest = Guest::new();
        let one = guest.module("one");
        guest.put_u32(one.offset(offset), u32::MAX);
        let error = guest.modules().unwrap_err();
        assert!(
            matches!(error, ModulesError::Unbelievable { .. }),
            "{error}"
        );
    }
    // Every pointer.
    for offset in [0x10, 0x70, 0xb8] {
        for wild in [1, 0x4141_4141_4141_4141, u64::MAX] {
            let mut guest = Guest::new();
            let one = guest.module("one");
            guest.fake.put_u64(one.offset(offset), wild);
            let error = guest.modules().unwrap_err();
            assert!(matches!(error, ModulesError::Unreadable { .. }), "{error}");
        }
    }
}

#[test]
fn symbol_tables_that_cannot_be_are_errors() {
    let rows: &[Row] = &[("", 0, 0, 0, 0), ("f", b't', 1, 0x100, 1)];
    for (offset, value) in [
        (0, 0x4141),
        (8, u32::MAX.into()),
        (8, 0x80_0000),
        (8, 0x10_0000),
        (0x10, 0x4141),
        (0x18, 0x4141),
    ] {
        let mut guest = Guest::new();
        let one = guest.module("one");
        let table = guest.symbols_of(one, rows);
        guest.fake.put_u64(table.offset(offset), value);
        assert!(guest.symbols().is_err(), "{offset:#x} {value:#x}");
    }
    // A name that is far away.
    let mut guest = Guest::new();
    let one = guest.module("one");
    let table = guest.symbols_of(one, rows);
    let space = guest.located.space(&guest.fake.image);
    let symbols = space.read_pointer(table).unwrap();
    guest.put_u32(symbols.offset(24), u32::MAX);
    assert!(matches!(
        guest.symbols(),
        Err(ModulesError::Unbelievable { .. })
    ));
    // Exports that are not there.
    let mut guest = Guest::new();
    let one = guest.module("one");
    guest.symbols_of(one, rows);
    guest.put_u32(one.offset(0xc8), 5);
    assert!(matches!(
        guest.symbols(),
        Err(ModulesError::Unreadable { .. })
    ));
}

#[test]
fn types_of_modules_are_found() {
    let mut guest = Guest::new();
    guest.module("one");
    let two = guest.module("two");
    let (entry, btf, data) = (guest.alloc(0x20), guest.alloc(0x10), guest.alloc(0x10));
    let head = TYPES.at(SLIDE);
    guest.fake.put_u64(head, entry.offset(8).0);
    guest.fake.put_u64(entry.offset(8), head.0);
    guest.fake.put_u64(entry, two.0);
    guest.fake.put_u64(entry.offset(0x18), btf.0);
    guest.fake.put_u64(btf, data.0);
    guest.put_u32(btf.offset(8), 5);
    guest.fake.put(data, b"types");
    let read = |guest: &Guest, index: usize| {
        let space = guest.located.space(&guest.fake.image);
        guest.layout.type_data(&space, &guest.modules()?[index])
    };
    assert_eq!(read(&guest, 0), Ok(None));
    assert_eq!(read(&guest, 1), Ok(Some(b"types".to_vec())));
    guest.put_u32(btf.offset(8), u32::MAX);
    assert!(matches!(
        read(&guest, 1),
        Err(ModulesError::Unbelievable { .. })
    ));
    guest.fake.put_u64(entry.offset(8), entry.offset(8).0);
    assert!(matches!(guest.modules(), Err(ModulesError::Circle { .. })));
}
