//! See `fuzz::btf`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::btf(data));
