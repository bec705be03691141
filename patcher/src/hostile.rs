//! Guests that lie: whatever they say, every look at them ends, and an answer that is given is
//! whole.

use std::sync::OnceLock;
use std::time::Duration;

use proptest::prelude::*;

use crate::Kernel;
use crate::guest::{Gpa, GuestMemory, Gva, MemoryError, MemoryImage, RamRange, StoppedGuest};
use crate::image::Image;
use crate::klog::last_records;
use crate::space::{Bounds, Landmarks, Located, Root, Space, SpaceError};
use crate::symbols::ModulesLayout;
use crate::synthetic::{Btf, Guest, Plan, Restless, SLIDE};
use crate::tasks::{
    Survey, SurveyLayout, Task, TaskError, TaskLayout, Windows, scan, survey, tasks,
};

/// A guest that is well, and what its kernel's file tells.
struct Well {
    guest: Guest,
    located: Located,
    tasks: TaskLayout,
    survey: SurveyLayout,
    modules: ModulesLayout,
}

fn well() -> &'static Well {
    static WELL: OnceLock<Well> = OnceLock::new();
    WELL.get_or_init(|| {
        let mut guest = Guest::new(Plan::new(), 0x10_0000);
        let init = guest.process(1, "init");
        for pid in 2..40 {
            guest.process(pid, "many");
        }
        guest.thread(init, 70);
        guest.add_cpu();
        let late = guest.loose(90, "late");
        guest.exiting(late);
        guest.module("one", &Btf::example().write());
        guest.module("two", &[]);
        guest.log("hello");
        let kernel = guest.kernel.clone();
        let marks = Landmarks::of(&kernel).unwrap();
        Well {
            located: Located::find(&guest.fake.image, &marks).unwrap(),
            tasks: TaskLayout::of(&kernel).unwrap(),
            survey: SurveyLayout::of(&kernel).unwrap(),
            modules: ModulesLayout::of(&kernel).unwrap().unwrap(),
            guest,
        }
    })
}

impl Well {
    fn survey(&self, space: &Space<'_>) -> Result<Survey, TaskError> {
        let vcpus = self.guest.fake.image.vcpus();
        survey(space, &self.located, &self.tasks, &self.survey, vcpus)
    }

    fn tasks(&self, space: &Space<'_>) -> Result<Vec<Task>, TaskError> {
        tasks(space, &self.located, &self.tasks)
    }

    /// Looks at all that there is; tells what could not be told.
    fn look(&self, memory: &dyn GuestMemory, bounds: Bounds) -> Vec<String> {
        let space = || Space::bounded(memory, self.located.root, bounds);
        let vcpus = self.guest.fake.image.vcpus();
        let windows = Windows::new([self.guest.code("schedule")..self.guest.code("_etext")]);
        let log = self.guest.kernel.log_layout().unwrap();
        let all = [
            self.survey(&space()).err().map(|e| e.to_string()),
            self.tasks(&space()).err().map(|e| e.to_string()),
            scan(&space(), &self.located, &self.tasks, vcpus, &windows)
                .err()
                .map(|e| e.to_string()),
            self.modules
                .modules(&space(), &self.located)
                .and_then(|modules| self.modules.with_symbols(&space(), modules, &|_| true))
                .err()
                .map(|e| e.to_string()),
            last_records(&space(), &log, SLIDE, 100)
                .err()
                .map(|e| e.to_string()),
        ];
        all.into_iter().flatten().collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands in the places that mean something.
    #[test]
    fn looks_at_damaged_guests_end(edits in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
        Just(0), Just(u64::MAX), Just(1 << 63), any::<u64>(), 0..0x1000_u64,
    ]), 1..12), moves in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..6)) {
        let well = well();
        let mut image = well.guest.fake.image.clone();
        let places = &well.guest.fake.places;
        for (place, value) in edits {
            image.write(place.get(places).gpa, &value.to_le_bytes()).unwrap();
        }
        // What one place holds, in another: lists run into each other, tables into themselves.
        for (from, to) in moves {
            let value = image.read_u64(from.get(places).gpa).unwrap();
            image.write(to.get(places).gpa, &value.to_le_bytes()).unwrap();
        }
        well.look(&image, Bounds::USUAL);
    }

    /// A guest that changes under the look.
    #[test]
    fn looks_at_restless_guests_end(seed: u64, rarity in 1..400_usize) {
        let well = well();
        let memory = Restless::new(&well.guest.fake.image, seed, rarity);
        well.look(&memory, Bounds::USUAL);
        prop_assert!(memory.reads() < 1_000_000);
    }

    /// Nothing that was cut short is taken for the whole.
    #[test]
    fn what_hits_a_bound_is_an_error(steps in 0..900_u64, bytes in 0..40_000_u64, entries in 0..60_usize) {
        let well = well();
        let image = &well.guest.fake.image;
        let whole = well.survey(&well.located.space(image)).unwrap();
        for bounds in [
            Bounds { steps, ..Bounds::USUAL },
            Bounds { bytes, ..Bounds::USUAL },
            Bounds { entries, ..Bounds::USUAL },
        ] {
            let space = Space::bounded(image, well.located.root, bounds);
            match well.survey(&space) {
                Ok(told) => prop_assert_eq!(&told, &whole),
                Err(TaskError::Unreadable { source, .. }) => prop_assert!(source.is_bound()),
                Err(TaskError::Endless { limit, .. }) => prop_assert_eq!(limit, entries),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }

    /// A kernel's file that is cut off or damaged.
    #[test]
    fn damaged_files_are_refused_or_read(at: prop::sample::Index, seed: u64) {
        static FILE: OnceLock<Vec<u8>> = OnceLock::new();
        let file = FILE.get_or_init(|| Plan::new().file(&[]));
        let at = at.index(file.len());
        prop_assert!(Kernel::open(file[..at].to_vec()).is_err());
        let mut damaged = file.clone();
        crate::synthetic::Random::new(seed).damage(&mut damaged);
        let _ = Image::open(damaged.clone());
        if let Ok(kernel) = Kernel::open(damaged) {
            let _ = (Landmarks::of(&kernel), TaskLayout::of(&kernel), SurveyLayout::of(&kernel));
        }
    }
}

/// A task list without end: every task is there, whatever its address.
struct Endless {
    image: MemoryImage,
    /// Where the tasks' pages are, above all RAM.
    from: u64,
    /// Bytes from one to the next.
    step: u64,
    next: u64,
    signal: u64,
    head: u64,
    thread: u64,
}

impl GuestMemory for Endless {
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let Some(inside) = at.0.checked_sub(self.from) else {
            return self.image.read(at, into);
        };
        into.fill(0);
        // Physical addresses there are what they are in the direct map.
        let this = DIRECT.0 + at.0 - inside % self.step;
        let offset = inside % self.step;
        let value = match offset {
            o if o == self.next => this + self.step + self.next,
            o if o == self.signal => this,
            o if o == self.head => this + self.thread,
            o if o == self.thread => this + self.head,
            _ => 0,
        };
        for (to, from) in into.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
        Ok(())
    }

    fn ram(&self) -> Vec<RamRange> {
        let len = 1 << 40;
        vec![RamRange { start: Gpa(0), len }]
    }
}

/// Where the tasks without end are mapped: all of it by one entry of the top-level table.
const DIRECT: Gva = Gva(0xffff_9000_0000_0000);

#[test]
fn a_task_list_of_millions_ends_in_an_error() {
    let well = well();
    let mut guest = well.guest.clone();
    let span = |path: &str| guest.plan.shape.span(path).offset;
    let (next, signal) = (span("task_struct.tasks"), span("task_struct.signal"));
    let (head, thread) = (
        span("signal_struct.thread_head"),
        span("task_struct.thread_node"),
    );
    let last = guest.variable("init_task").offset(next);
    // 512 GiB in pages of 1 GiB: a table of the third level.
    let table = guest.fake.entry(DIRECT, 3);
    for number in 0..512 {
        guest
            .fake
            .set(Gpa((table.0 & !0xfff) + number * 8), number << 30 | 0x83);
    }
    let from = 1 << 30;
    guest.fake.put_u64(last, DIRECT.0 + from + next);
    let memory = Endless {
        image: guest.fake.image.clone(),
        from,
        step: 0x400,
        next,
        signal,
        head,
        thread,
    };
    let look = |bounds| well.tasks(&Space::bounded(&memory, well.located.root, bounds));
    let few = Bounds {
        entries: 1 << 20,
        ..Bounds::USUAL
    };
    let error = look(few).unwrap_err();
    assert!(
        matches!(
            error,
            TaskError::Endless {
                limit: 0x10_0000,
                ..
            }
        ),
        "{error}"
    );
    let short = Bounds {
        time: Duration::from_millis(1),
        ..Bounds::USUAL
    };
    let error = look(short).unwrap_err();
    let TaskError::Unreadable { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(source, SpaceError::Time { .. }), "{error}");
}

#[test]
fn tables_that_map_themselves_give_memory_without_end_and_an_end_to_it() {
    let mut guest = crate::synthetic::FakeGuest::new(0x1_0000);
    // Every entry of the top-level table leads to the table itself: all of the address space is
    // the table.
    for entry in 0..512 {
        guest.set(guest.root.offset(entry * 8), guest.root.0 | 7);
    }
    let root: Root = guest.root();
    let bounds = Bounds {
        steps: 100_000,
        ..Bounds::USUAL
    };
    let space = Space::bounded(&guest.image, root, bounds);
    let error = space.pieces(Gva(0), 1 << 47).unwrap_err();
    assert_eq!(error, SpaceError::Steps { limit: 100_000 });
    assert_eq!(space.read_u64(Gva(0)).unwrap_err(), error);
    let many = Space::bounded(
        &guest.image,
        root,
        Bounds {
            bytes: 0x1_0000,
            ..bounds
        },
    );
    let mut bytes = vec![0; 0x2_0000];
    let error = many.read(Gva(0), &mut bytes).unwrap_err();
    assert_eq!(error, SpaceError::Bytes { limit: 0x1_0000 });
}

#[test]
fn the_guest_that_is_damaged_is_well() {
    let well = well();
    assert_eq!(well.look(&well.guest.fake.image, Bounds::USUAL), [""; 0]);
}
