//! The guest's kernel as the patcher knows it: opened from its file when first needed.
//!
//! Opening takes a good part of a second and tens of megabytes, which a guest that nobody looks
//! into need not pay.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use patcher::{Kernel, KernelError};

use super::boot::NamedFile;

/// Why the kernel could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum KernelFileError {
    /// The file cannot be read any more.
    #[error("cannot read the kernel's file: {0}")]
    Read(#[from] io::Error),
    /// It is no kernel that the patcher understands.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// The opened kernel, or nothing yet.
#[derive(Default)]
pub(super) struct KernelFile {
    opened: Mutex<Option<Arc<Kernel>>>,
}

/// A kernel file larger than this is not read.
const MAX_LEN: u64 = 1 << 30;

impl KernelFile {
    /// The kernel of `file`, opened now if it has not been. Callers wait for one another.
    pub(super) fn get(&self, file: &NamedFile) -> Result<Arc<Kernel>, KernelFileError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = &*opened {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(Kernel::open(read_whole(file)?)?);
        tracing::info!(release = kernel.release(), "opened the guest's kernel");
        Ok(opened.insert(kernel).clone())
    }

    /// As [`KernelFile::get`], but forgets the kernel again if nobody had opened it before.
    pub(super) fn borrow(&self, file: &NamedFile) -> Result<Arc<Kernel>, KernelFileError> {
        let opened = self
            .opened
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match opened {
            Some(kernel) => Ok(kernel),
            None => Ok(Arc::new(Kernel::open(read_whole(file)?)?)),
        }
    }
}

/// Reads without moving the file's offset, which the boot loader uses.
fn read_whole(file: &NamedFile) -> io::Result<Vec<u8>> {
    let len = file.file.metadata()?.len();
    if len > MAX_LEN {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "larger than any kernel",
        ));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
