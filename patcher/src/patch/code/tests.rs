use ::object::elf::{
    R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, RelocationType,
};
use object::write::{Object, Relocation, SectionId, Symbol, SymbolId, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionFlags, SectionKind,
    SymbolFlags, SymbolKind, SymbolScope,
};

use super::*;
use crate::guest::{Gva, Slide};

const CODE: Gva = Gva(0xffff_ffff_ff80_0000);
const DATA: Gva = Gva(0xffff_ffff_ffa0_0000);
const SLIDE: Slide = Slide(0x1000_0000);
const PRINTF: LinkAddr = LinkAddr(0xffff_ffff_8123_4560);

struct Builder {
    object: Object<'static>,
    text: SectionId,
}

impl Builder {
    fn new(code: &[u8]) -> Self {
        let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let text = object.add_section(Vec::new(), b".text".to_vec(), SectionKind::Text);
        object.append_section_data(text, code, 16);
        Self { object, text }
    }

    fn section(&mut self, name: &str, kind: SectionKind, content: &[u8]) -> SectionId {
        let id = self
            .object
            .add_section(Vec::new(), name.as_bytes().to_vec(), kind);
        self.object.append_section_data(id, content, 8);
        id
    }

    fn symbol(&mut self, name: &str, section: SymbolSection, value: u64) -> SymbolId {
        self.object.add_symbol(Symbol {
            name: name.as_bytes().to_vec(),
            value,
            size: 0,
            kind: if section == SymbolSection::Undefined {
                SymbolKind::Unknown
            } else {
                SymbolKind::Text
            },
            scope: SymbolScope::Dynamic,
            weak: false,
            section,
            flags: SymbolFlags::None,
        })
    }

    fn function(&mut self, name: &str, at: u64) -> SymbolId {
        let text = SymbolSection::Section(self.text);
        self.symbol(name, text, at)
    }

    fn undefined(&mut self, name: &str) -> SymbolId {
        self.symbol(name, SymbolSection::Undefined, 0)
    }

    fn relocate(&mut self, at: u64, symbol: SymbolId, kind: RelocationType, addend: i64) {
        self.relocate_in(self.text, at, symbol, kind, addend);
    }

    fn relocate_in(
        &mut self,
        section: SectionId,
        offset: u64,
        symbol: SymbolId,
        r_type: RelocationType,
        addend: i64,
    ) {
        let relocation = Relocation {
            offset,
            symbol,
            addend,
            flags: RelocationFlags::Elf { r_type },
        };
        self.object.add_relocation(section, relocation).unwrap();
    }

    fn parse(&self) -> Result<Code, ObjectError> {
        Code::object(&self.object.write().unwrap(), &resolve)
    }
}

fn resolve(name: &str) -> Result<Resolved, String> {
    match name {
        "seq_printf" => Ok(Resolved::Linked(PRINTF)),
        "__x86_return_thunk" => Ok(Resolved::Linked(LinkAddr(0xffff_ffff_8200_0000))),
        "pcpu_hot" => Ok(Resolved::Absolute(0x35000)),
        _ => Err("there is no such symbol".into()),
    }
}

fn linked(code: &Code, returns: ReturnSites) -> (Vec<u8>, Vec<u8>) {
    let placed = Placed {
        code: CODE,
        data: DATA,
    };
    link(code, placed, SLIDE, returns).unwrap()
}

#[test]
fn calls_into_the_kernel_follow_the_slide() {
    let mut object = Builder::new(&[0xe8, 0, 0, 0, 0, 0xc3]);
    object.function("show", 0);
    let printf = object.undefined("seq_printf");
    object.relocate(1, printf, R_X86_64_PLT32, -4);
    let code = object.parse().unwrap();
    assert_eq!(code.keep, None);
    assert_eq!(code.entry(None, "show").unwrap(), 0);
    let (text, data) = linked(&code, ReturnSites::Ret);
    let distance = i32::from_le_bytes(text[1..5].try_into().unwrap());
    assert_eq!(CODE.offset(5).displace(distance.into()), PRINTF.at(SLIDE));
    assert!(data.is_empty());
}

#[test]
fn strings_and_data_go_where_they_belong() {
    // mov $string,%rsi ; mov %rax,counter(%rip) ; ret
    let mut object = Builder::new(&[
        0x48, 0xc7, 0xc6, 0, 0, 0, 0, 0x48, 0x89, 0x05, 0, 0, 0, 0, 0xc3,
    ]);
    let rodata = object.section(".rodata.str1.1", SectionKind::ReadOnlyString, b"hello\0");
    let bss =
        object
            .object
            .add_section(Vec::new(), b".bss".to_vec(), SectionKind::UninitializedData);
    object.object.append_section_bss(bss, 8, 8);
    object.function("show", 0);
    let string = object.object.section_symbol(rodata);
    let counter = object.object.section_symbol(bss);
    object.relocate(3, string, R_X86_64_32S, 0);
    object.relocate(10, counter, R_X86_64_PC32, -4);
    let code = object.parse().unwrap();
    assert!(
        code.keep
            .as_deref()
            .unwrap()
            .contains("byte 0x0 takes an address")
    );
    let (text, data) = linked(&code, ReturnSites::Ret);
    let at = i32::from_le_bytes(text[3..7].try_into().unwrap());
    let offset = usize::try_from(Gva(i64::from(at).cast_unsigned()).distance_from(CODE)).unwrap();
    assert_eq!(&text[offset..offset + 6], b"hello\0");
    let distance = i32::from_le_bytes(text[10..14].try_into().unwrap());
    assert_eq!(CODE.offset(14).displace(distance.into()), DATA);
    assert_eq!(data, [0; 8]);
}

#[test]
fn data_that_is_only_read_and_written_does_not_keep_code() {
    // incq counter(%rip) ; ret
    let mut object = Builder::new(&[0x48, 0xff, 0x05, 0, 0, 0, 0, 0xc3]);
    let data = object.section(".data", SectionKind::Data, &[7; 8]);
    let counter = object.object.section_symbol(data);
    object.relocate(3, counter, R_X86_64_PC32, -4);
    assert_eq!(object.parse().unwrap().keep, None);
    // A pointer in that data to the function does.
    let function = object.function("hit", 0);
    object.relocate_in(data, 0, function, R_X86_64_64, 0);
    let code = object.parse().unwrap();
    assert!(
        code.keep
            .as_deref()
            .unwrap()
            .contains("its data at byte 0x0")
    );
    let (_, data) = linked(&code, ReturnSites::AsBuilt);
    assert_eq!(data, CODE.0.to_le_bytes());
}

#[test]
fn returns_are_what_the_kernel_made_of_its_own() {
    let mut object = Builder::new(&[0x90, 0xe9, 0, 0, 0, 0]);
    let thunk = object.undefined("__x86_return_thunk");
    object.relocate(2, thunk, R_X86_64_PLT32, -4);
    let code = object.parse().unwrap();
    let (text, _) = linked(&code, ReturnSites::Ret);
    assert_eq!(text, [0x90, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
    let safe = Gva(0xffff_ffff_9300_0040);
    let (text, _) = linked(&code, ReturnSites::Jump(safe));
    let distance = i32::from_le_bytes(text[2..6].try_into().unwrap());
    assert_eq!(CODE.offset(6).displace(distance.into()), safe);
    let (text, _) = linked(&code, ReturnSites::AsBuilt);
    let distance = i32::from_le_bytes(text[2..6].try_into().unwrap());
    assert_eq!(
        CODE.offset(6).displace(distance.into()),
        Gva(0xffff_ffff_9200_0000)
    );
}

#[test]
fn the_tracer_call_becomes_a_nop() {
    let mut object = Builder::new(&[0xf3, 0x0f, 0x1e, 0xfa, 0xe8, 0, 0, 0, 0, 0xc3]);
    let fentry = object.undefined("__fentry__");
    object.relocate(5, fentry, R_X86_64_PLT32, -4);
    let code = object.parse().unwrap();
    assert_eq!(code.text[4..9], NOP5_BYTES);
    assert!(code.fixups.is_empty());
}

const NOP5_BYTES: [u8; 5] = crate::text::NOP5;

#[test]
fn per_cpu_variables_wrap_around_the_address_space() {
    // mov %gs:pcpu_hot(%rip),%rax
    let mut object = Builder::new(&[0x65, 0x48, 0x8b, 0x05, 0, 0, 0, 0, 0xc3]);
    let hot = object.undefined("pcpu_hot");
    object.relocate(4, hot, R_X86_64_PC32, -4);
    let (text, _) = linked(&object.parse().unwrap(), ReturnSites::Ret);
    let distance = i32::from_le_bytes(text[4..8].try_into().unwrap());
    assert_eq!(CODE.offset(8).displace(distance.into()), Gva(0x35000));
}

#[test]
fn what_the_guest_would_have_to_know_is_refused_by_name() {
    for (name, kind) in [
        ("__ex_table", SectionKind::ReadOnlyData),
        ("__bug_table", SectionKind::Data),
        (".altinstructions", SectionKind::ReadOnlyData),
        ("__jump_table", SectionKind::Data),
        (".static_call_sites", SectionKind::ReadOnlyData),
        (".data..percpu", SectionKind::Data),
        (".data..percpu..shared_aligned", SectionKind::Data),
    ] {
        let mut object = Builder::new(&[0xc3]);
        object.section(name, kind, &[0; 8]);
        match object.parse() {
            Err(ObjectError::Section { section, .. }) => assert_eq!(section, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn what_only_describes_the_code_is_left_out() {
    let mut object = Builder::new(&[0xc3]);
    object.section(".orc_unwind", SectionKind::ReadOnlyData, &[0; 8]);
    object.section(".note.gnu.property", SectionKind::Note, &[0; 8]);
    object.section(".comment", SectionKind::OtherString, b"gcc\0");
    assert_eq!(object.parse().unwrap().text, [0xc3]);
}

#[test]
fn writable_code_is_refused() {
    let mut object = Builder::new(&[0xc3]);
    let id = object.section(".both", SectionKind::Text, &[0xc3]);
    let flags =
        ::object::elf::SHF_ALLOC.0 | ::object::elf::SHF_EXECINSTR.0 | ::object::elf::SHF_WRITE.0;
    object.object.section_mut(id).flags = SectionFlags::Elf {
        sh_type: ::object::elf::SHT_PROGBITS,
        sh_flags: ::object::elf::SectionFlags(flags),
    };
    assert!(matches!(object.parse(), Err(ObjectError::Section { .. })));
}

#[test]
fn unknown_symbols_and_relocations_are_named() {
    let mut object = Builder::new(&[0xe8, 0, 0, 0, 0, 0xc3]);
    let missing = object.undefined("no_such_thing");
    object.relocate(1, missing, R_X86_64_PLT32, -4);
    let error = object.parse().unwrap_err().to_string();
    assert_eq!(error, "symbol no_such_thing: there is no such symbol");

    let mut object = Builder::new(&[0xe8, 0, 0, 0, 0, 0xc3]);
    let printf = object.undefined("seq_printf");
    object.relocate(1, printf, ::object::elf::R_X86_64_GOTPCREL, -4);
    assert!(matches!(
        object.parse(),
        Err(ObjectError::Relocation { kind: 9, .. })
    ));
}

#[test]
fn relocations_outside_their_section_or_reach_are_refused() {
    let mut object = Builder::new(&[0x90, 0xc3]);
    let printf = object.undefined("seq_printf");
    object.relocate(0, printf, R_X86_64_PC32, 0);
    assert!(matches!(object.parse(), Err(ObjectError::Outside { .. })));

    let mut object = Builder::new(&[0xb8, 0, 0, 0, 0, 0xc3]);
    let printf = object.undefined("seq_printf");
    object.relocate(1, printf, R_X86_64_32, 0);
    let code = object.parse().unwrap();
    let placed = Placed {
        code: CODE,
        data: DATA,
    };
    let error = link(&code, placed, SLIDE, ReturnSites::Ret).unwrap_err();
    assert_eq!(error.target, PRINTF.at(SLIDE).0);
}

#[test]
fn the_function_to_jump_to_is_never_guessed() {
    let mut object = Builder::new(&[0xc3, 0xc3]);
    object.function("first", 0);
    object.function("second", 1);
    let code = object.parse().unwrap();
    assert_eq!(code.entry(None, "second").unwrap(), 1);
    assert_eq!(code.entry(Some("first"), "second").unwrap(), 0);
    let error = code.entry(None, "third").unwrap_err().to_string();
    assert!(error.contains("first, second"), "{error}");
}

#[test]
fn raw_code_is_kept_only_when_it_takes_its_own_address() {
    assert_eq!(Code::raw(&[0x31, 0xc0, 0xc3]).unwrap().keep, None);
    // lea 0(%rip),%rax ; ret
    let code = Code::raw(&[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0xc3]).unwrap();
    assert!(code.keep.is_some());
    assert!(Code::raw(&[0x06]).unwrap().keep.is_some());
    assert_eq!(Code::raw(&[]), Err(ObjectError::Empty));
    assert!(matches!(
        Code::raw(&vec![0x90; elf::MAX_CODE + 1]),
        Err(ObjectError::TooLarge { .. })
    ));
}

#[test]
fn broken_files_are_refused() {
    let good = {
        let mut object = Builder::new(&[0xe8, 0, 0, 0, 0, 0xc3]);
        object.function("show", 0);
        let printf = object.undefined("seq_printf");
        object.relocate(1, printf, R_X86_64_PLT32, -4);
        object.object.write().unwrap()
    };
    assert!(Code::object(&good, &resolve).is_ok());
    for len in 0..good.len() {
        let _ = Code::object(&good[..len], &resolve);
    }
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            if let Ok(code) = Code::object(&bad, &resolve) {
                let placed = Placed {
                    code: CODE,
                    data: DATA,
                };
                let _ = link(&code, placed, SLIDE, ReturnSites::Ret);
            }
        }
    }
}
