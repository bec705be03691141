//! See `fuzz::tasks`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::tasks(data));
