//! `inspect FILE`: what a kernel's file or a memory dump says, without any VMM.
//!
//! What the file is, its first bytes tell. A dump needs its kernel's file beside it.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use patcher::Kernel;
use patcher::error::with_causes;
use patcher::guest::MemoryImage;
use patcher::image::Kind;
use patcher::space::{Landmarks, Located, complete_registers};
use patcher::text::Surveyor;
use serde_json::{Value, json};

use super::connection::ClientError;
use super::offline::Offline;
use super::{render, say};
use crate::cli::args::{InspectArgs, Part};

/// Functions that `--function` shows at most.
const MOST_FUNCTIONS: usize = 1000;
/// A kernel's file larger than this is not read.
const MAX_KERNEL: u64 = 1 << 30;
/// An ELF file whose type is ET_CORE: magic, 64 bits, little-endian, and the type at byte 16.
const CORE: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const ET_CORE: [u8; 2] = [4, 0];

pub(super) fn run(as_json: bool, inspect: &InspectArgs) -> Result<(), ClientError> {
    let Some(path) = &inspect.file else {
        return Ok(());
    };
    let (mut file, is_dump) = open(path)?;
    let (answer, show): (Value, fn(&Value) -> String) = if is_dump {
        let Some(kernel) = &inspect.kernel else {
            return Err(ClientError::Usage {
                path: path.clone(),
                why: "this is a memory dump: give the file of its kernel with --kernel",
            });
        };
        let (mut kernel_file, _) = open(kernel)?;
        let kernel = open_kernel(kernel, &mut kernel_file)?;
        let dump = read(path, &mut file, u64::MAX)?;
        (
            of_dump(path, inspect, &kernel, dump)?,
            render::inspected_dump,
        )
    } else {
        let kernel = open_kernel(path, &mut file)?;
        let function = inspect.function.as_deref();
        (
            of_kernel(path, &kernel, function)?,
            render::inspected_kernel,
        )
    };
    if as_json {
        say(&answer.to_string())
    } else {
        say(show(&answer).trim_end())
    }
}

fn refused(path: &Path, why: impl std::fmt::Display) -> ClientError {
    ClientError::Refused {
        class: "GenericError".into(),
        desc: format!("{}: {why}", path.display()),
    }
}

fn unreadable(path: &Path) -> impl Fn(std::io::Error) -> ClientError + '_ {
    |source| ClientError::File {
        path: path.to_owned(),
        source,
    }
}

/// The file, and whether it is a memory dump.
fn open(path: &Path) -> Result<(File, bool), ClientError> {
    let failed = unreadable(path);
    let mut file = File::open(path).map_err(&failed)?;
    let mut head = Vec::new();
    (&mut file)
        .take(18)
        .read_to_end(&mut head)
        .map_err(&failed)?;
    file.rewind().map_err(&failed)?;
    let is_dump = head.starts_with(&CORE) && head.ends_with(&ET_CORE);
    Ok((file, is_dump))
}

fn read(path: &Path, file: &mut File, most: u64) -> Result<Vec<u8>, ClientError> {
    let failed = unreadable(path);
    let metadata = file.metadata().map_err(&failed)?;
    if !metadata.is_file() || metadata.len() > most {
        return Err(refused(path, "not a kernel: it is too large, or no file"));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
    file.read_to_end(&mut bytes).map_err(&failed)?;
    Ok(bytes)
}

fn open_kernel(path: &Path, file: &mut File) -> Result<Kernel, ClientError> {
    let bytes = read(path, file, MAX_KERNEL)?;
    Kernel::open(bytes).map_err(|error| refused(path, with_causes(&error)))
}

/// What a kernel is called by.
fn identity(kernel: &Kernel) -> Value {
    let id = kernel.build_id().map(|id| {
        let digits = id.bytes.iter().map(|byte| format!("{byte:02x}"));
        digits.collect::<String>()
    });
    json!({
        "release": kernel.release(),
        "banner": kernel.banner().text,
        "build-id": id,
    })
}

fn of_kernel(path: &Path, kernel: &Kernel, function: Option<&str>) -> Result<Value, ClientError> {
    let failed = |error| refused(path, with_causes(&error));
    let surveyor = Surveyor::of(kernel).map_err(failed)?;
    let kind = match kernel.image().kind() {
        Kind::Vmlinux => "vmlinux".to_owned(),
        Kind::BzImage(_) => "bzImage".to_owned(),
    };
    let sections: Vec<Value> = kernel
        .image()
        .sections()
        .iter()
        .filter(|section| section.allocated)
        .map(|section| {
            json!({
                "name": section.name,
                "address": section.address,
                "size": section.size,
                "executable": section.executable,
                "writable": section.writable,
            })
        })
        .collect();
    let mut answer = identity(kernel);
    answer["what"] = "kernel".into();
    answer["kind"] = kind.into();
    answer["symbols"] = kernel.symbols().len().into();
    answer["types"] = kernel.types().len().into();
    answer["relocations-listed"] = kernel.image().relocations().is_some().into();
    match function {
        Some(pattern) => {
            let found = surveyor.matching(pattern, MOST_FUNCTIONS);
            if found.is_empty() {
                return Err(refused(
                    path,
                    format_args!("no function is called {pattern}"),
                ));
            }
            answer["functions"] = json!(found);
        }
        None => {
            answer["patching"] = json!(surveyor.all());
            answer["sections"] = sections.into();
        }
    }
    Ok(answer)
}

fn of_dump(
    path: &Path,
    inspect: &InspectArgs,
    kernel: &Kernel,
    dump: Vec<u8>,
) -> Result<Value, ClientError> {
    let failed = |error: &dyn std::error::Error| refused(path, with_causes(error));
    let mut image = MemoryImage::from_core(dump).map_err(|error| failed(&error))?;
    let mut marks = Landmarks::of(kernel).map_err(|error| failed(&error))?;
    marks.bounds = inspect.bounds.bounds();
    complete_registers(&mut image, &marks).map_err(|error| failed(&error))?;
    let located = Located::find_in_any_state(&image, &marks).map_err(|error| failed(&error))?;
    let mut answer = identity(kernel);
    answer["what"] = "dump".into();
    answer["slide"] = format!("{:#x}", located.slide.0).into();
    answer["phys-base"] = json!(located.phys_base);
    answer["possible-cpus"] = located.per_cpu.cpus().count().into();
    let offline = Offline {
        kernel,
        image: &image,
        located: &located,
        pid: inspect.pid,
    };
    let parts = match inspect.show.as_slice() {
        [] => &[Part::Cpus, Part::Tasks, Part::Text],
        some => some,
    };
    for &part in parts {
        let (name, told) = offline.part(part).map_err(|why| refused(path, why))?;
        answer[name] = told;
    }
    Ok(answer)
}
