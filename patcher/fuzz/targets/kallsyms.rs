//! See `fuzz::kallsyms`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::kallsyms(data));
