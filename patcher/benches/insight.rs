//! How long it takes to see into a guest: opening its kernel, and its tasks and their stacks in
//! memory dumps of guests with a thousand and with ten thousand tasks. `scripts/bench insight` makes
//! the dumps and names them in the environment.

#![allow(
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a benchmark fails by panicking, and criterion's macros make its functions"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use patcher::Kernel;
use patcher::guest::{Gva, MemoryImage, StoppedGuest};
use patcher::space::{Landmarks, Located, complete_registers};
use patcher::stack::{StackLayout, Trace, Unwinder};
use patcher::tasks::{TaskLayout, Windows, scan, tasks};

fn file(variable: &str) -> (PathBuf, Vec<u8>) {
    let path = std::env::var_os(variable).map(PathBuf::from);
    let path = path.unwrap_or_else(|| panic!("{variable} is not set: use scripts/bench insight"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (path, bytes)
}

/// A dumped guest whose kernel was found.
struct Guest {
    image: MemoryImage,
    located: Located,
}

fn guest(kernel: &Kernel, variable: &str) -> Guest {
    let (path, bytes) = file(variable);
    let marks = Landmarks::of(kernel).expect("the kernel's landmarks");
    let image = MemoryImage::from_core(bytes);
    let mut image = image.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    complete_registers(&mut image, &marks).expect("the kernel is in the dump");
    let located = Located::find(&image, &marks).expect("the kernel is in the dump");
    Guest { image, located }
}

fn stacks_of(kernel: &Kernel) -> StackLayout {
    StackLayout::of(kernel).expect("a kernel with unwind tables")
}

fn insight(criterion: &mut Criterion) {
    let (_, vmlinuz) = file("INSIGHT_KERNEL");
    criterion.bench_function("open the kernel", |bencher| {
        bencher.iter_with_large_drop(|| {
            let kernel = Kernel::open(vmlinuz.clone()).expect("a kernel");
            let stacks = stacks_of(&kernel);
            (kernel, stacks)
        });
    });
    let kernel = Arc::new(Kernel::open(vmlinuz.clone()).expect("a kernel"));
    let resident = kernel.resident() / 1024;
    println!("resident: {resident} KiB of image, symbols, types and unwind tables");
    let layout = TaskLayout::of(&kernel).expect("tasks");
    let stacks = stacks_of(&kernel);

    for (name, variable) in [
        ("1,000", "INSIGHT_DUMP_1000"),
        ("10,000", "INSIGHT_DUMP_10000"),
    ] {
        let guest = guest(&kernel, variable);
        let space = guest.located.space(&guest.image);
        let all = tasks(&space, &guest.located, &layout).expect("tasks");
        println!("{name}: {} tasks", all.len());
        criterion.bench_function(&format!("list {name} tasks"), |bencher| {
            // As in a stop: nothing is known yet of where anything is.
            bencher.iter(|| {
                let space = guest.located.space(&guest.image);
                tasks(&space, &guest.located, &layout).expect("tasks")
            });
        });
        let nowhere = Windows::new([Gva(1)..Gva(2)]);
        criterion.bench_function(&format!("list and scan {name} tasks"), |bencher| {
            let vcpus = guest.image.vcpus();
            bencher.iter(|| {
                let space = guest.located.space(&guest.image);
                scan(&space, &guest.located, &layout, vcpus, &nowhere).expect("scan")
            });
        });
        let unwind = || {
            let space = guest.located.space(&guest.image);
            let vcpus = guest.image.vcpus();
            let located = &guest.located;
            let unwinder = Unwinder::new(&kernel, &stacks, &layout, &space, located, vcpus);
            let traces = all.iter().map(|task| unwinder.task(task));
            traces.filter(Trace::is_reliable).count()
        };
        println!("{name}: {} reliable", unwind());
        criterion.bench_function(&format!("unwind {name} tasks"), |bencher| {
            bencher.iter(unwind);
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = insight
}
criterion_main!(benches);
