//! See `fuzz::orc`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::orc(data));
