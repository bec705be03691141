//! What reads a guest's memory.

use patcher::guest::{Gva, StoppedGuest};
use patcher::klog::last_records;
use patcher::space::{Located, Root, Space, walk};
use patcher::symbols::{GuestSymbols, Loaded, SymbolQuery};
use patcher::tasks::{Windows, scan, survey, tasks as list};
use patcher::types::Types;

use crate::Input;
use crate::guests::Base;

/// Page tables that were changed, and where they lead.
pub fn page_walk(data: &[u8]) {
    let base = Base::get();
    base.edited(&mut Input::new(data), |edits, input| {
        let image = &*edits.image;
        let root = Root {
            table: patcher::guest::Gpa(u64::from(input.byte()) << 12),
            levels: 4 + (input.byte() & 1),
        };
        for root in [root, base.located.root] {
            let space = Space::new(image, root);
            let mut input = *input;
            for _ in 0..8 {
                let near = input
                    .pick(&base.guest.fake.places)
                    .and_then(|place| place.gva);
                let at = near.unwrap_or(Gva(input.long()));
                let at = at.displace(i64::from(input.short()) - 0x8000);
                let fresh = walk(image, root, at);
                let mut bytes = vec![0; usize::from(input.short())];
                let read = space.read(at, &mut bytes);
                assert!(fresh.is_ok() || bytes.is_empty() || read.is_err());
                let _ = space.read_sized(at, u64::from(input.byte()));
                let _ = space.pieces(at, u64::from(input.short()) << (input.byte() & 0x3f));
            }
        }
        let _ = Located::find(image, &base.marks);
        let _ = Located::find_in_any_state(image, &base.marks);
    });
}

/// Lists and tables of tasks that were changed.
pub fn tasks(data: &[u8]) {
    let base = Base::get();
    base.edited(&mut Input::new(data), |edits, _| {
        let image = &*edits.image;
        let space = base.located.space(image);
        let vcpus = image.vcpus();
        let told = survey(&space, &base.located, &base.tasks, &base.survey, vcpus);
        let listed = list(&space, &base.located, &base.tasks);
        if let (Ok(told), Ok(listed)) = (told, listed) {
            assert_eq!(told.tasks.len(), listed.len());
        }
        let windows = Windows::new([base.guest.code("schedule")..base.guest.code("has_no_frame")]);
        let _ = scan(&space, &base.located, &base.tasks, vcpus, &windows);
    });
}

/// A list of modules that was changed, with their symbols and types.
pub fn modules(data: &[u8]) {
    let base = Base::get();
    base.edited(&mut Input::new(data), |edits, _| {
        let image = &*edits.image;
        let space = base.located.space(image);
        let layout = &base.modules;
        let _ = layout.unsettled(&space, &base.located);
        let Ok(modules) = layout.modules(&space, &base.located) else {
            return;
        };
        for module in &modules {
            if let Ok(Some(types)) = layout.type_data(&space, module) {
                let _ = Types::parse_split(&types, base.guest.kernel.shared_types());
            }
            if let Ok(symbols) = layout.symbols(&space, module) {
                for symbol in symbols.iter() {
                    let _ = symbols.below(symbol.address());
                    let _ = (symbol.name(), symbol.size(), symbol.is_function());
                }
            }
        }
        let Ok(loaded) = layout.with_symbols(&space, modules, &|_| true) else {
            return;
        };
        let loaded = Loaded {
            slide: base.located.slide,
            modules: loaded,
        };
        let symbols = GuestSymbols::new(base.guest.kernel.symbols(), &loaded);
        let _ = symbols.matching(&SymbolQuery {
            pattern: "*s*",
            module: None,
            skip: 1,
            limit: 10,
        });
        for module in &loaded.modules {
            for text in module.module.text() {
                let _ = symbols.at(text.start.offset(0x110));
            }
        }
    });
}

/// A log that was changed.
pub fn log(data: &[u8]) {
    let base = Base::get();
    base.edited(&mut Input::new(data), |edits, input| {
        let image = &*edits.image;
        let space = base.located.space(image);
        let Ok(layout) = base.guest.kernel.log_layout() else {
            return;
        };
        let slide = base.located.slide;
        let limit = usize::from(input.short());
        let records = last_records(&space, &layout, slide, limit).unwrap_or_default();
        assert!(records.len() <= limit);
        let _ = patcher::klog::panic_message(&records);
        let _ = patcher::klog::panicked(&space, &layout, slide);
    });
}
