//! See `fuzz::page_walk`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::page_walk(data));
