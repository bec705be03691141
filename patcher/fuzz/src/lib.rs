//! Fuzz targets for everything that reads kernels and guest memory.
//!
//! Each is a function of some bytes that must come back, whatever the bytes are: no panic, no
//! overflow, no endless walk. What reads whole files gets the bytes as they are. What reads a
//! running guest gets a small synthetic guest that is well, and the bytes say what is changed in
//! it: see [`Edits`].
//!
//! `scripts/fuzz` builds and runs them; seeds come from the `seeds` program.

mod edits;
mod guests;
mod input;
mod targets;

pub use edits::Edits;
pub use input::Input;
pub use targets::*;

/// A target.
pub type Target = fn(&[u8]);

/// All targets by name, which is that of their programs and corpora as well.
pub const ALL: &[(&str, Target)] = &[
    ("image", image),
    ("kallsyms", kallsyms),
    ("btf", btf),
    ("orc", orc),
    ("stacks", stacks),
    ("page_walk", page_walk),
    ("tasks", tasks),
    ("modules", modules),
    ("log", log),
    ("core", core),
];

#[cfg(test)]
mod tests {
    use patcher::guest::StoppedGuest;
    use patcher::synthetic::Random;
    use patcher::tasks::survey;

    use super::guests::Base;
    use super::*;

    #[test]
    fn the_guest_is_well_before_and_after_it_is_changed() {
        let base = Base::get();
        for round in 0..20_u8 {
            base.edited(&mut Input::new(&[5, round, 0, 1, 2, 3, 4]), |_, _| ());
            base.edited(&mut Input::new(&[]), |edits, _| {
                let space = base.located.space(edits.image);
                let vcpus = edits.image.vcpus();
                let told = survey(&space, &base.located, &base.tasks, &base.survey, vcpus).unwrap();
                assert_eq!(told.disagreements, Vec::<String>::new());
                assert_eq!(told.tasks.len(), 7);
                let modules = base.modules.modules(&space, &base.located).unwrap();
                assert_eq!(modules.len(), 2);
            });
        }
    }

    #[test]
    fn targets_survive_anything() {
        let mut random = Random::new(3);
        for &(_, target) in ALL {
            for len in 0..40 {
                let mut byte = || u8::try_from(random.below(256)).unwrap();
                let input: Vec<u8> = (0..len).map(|_| byte()).collect();
                target(&input);
            }
        }
    }
}
