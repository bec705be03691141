//! See `fuzz::modules`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::modules(data));
