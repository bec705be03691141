//! Adds files to an initramfs: a kernel takes several archives one behind the other.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst, "newc".

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Files for the guest's root: path there, path here.
pub(crate) type Files = Vec<(String, PathBuf)>;

/// An initramfs of `base` and these files.
pub(crate) fn with_files(base: &Path, files: &Files) -> io::Result<Vec<u8>> {
    let mut bytes = fs::read(base)?;
    pad(&mut bytes);
    append(bytes, files)
}

/// An initramfs of these files.
pub(crate) fn of_files(files: &Files) -> io::Result<Vec<u8>> {
    append(Vec::new(), files)
}

fn append(mut bytes: Vec<u8>, files: &Files) -> io::Result<Vec<u8>> {
    for (name, from) in files {
        entry(
            &mut bytes,
            name.trim_start_matches('/'),
            0o100_755,
            &fs::read(from)?,
        )?;
    }
    entry(&mut bytes, "TRAILER!!!", 0, &[])?;
    Ok(bytes)
}

fn entry(bytes: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let len = u32::try_from(content.len()).map_err(io::Error::other)?;
    bytes.extend_from_slice(b"070701");
    // inode, mode, uid, gid, links, mtime, size, device (two), special device (two), name, check
    let fields = [0, mode, 0, 0, 1, 0, len, 0, 0, 0, 0];
    for field in fields {
        bytes.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes.extend_from_slice(format!("{:08x}{:08x}", name.len() + 1, 0).as_bytes());
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(content);
    pad(bytes);
    Ok(())
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpio_tool_reads_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        let mut empty = Vec::new();
        entry(&mut empty, "TRAILER!!!", 0, &[]).unwrap();
        fs::write(&base, &empty).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"12345").unwrap();
        let whole = with_files(&base, &vec![("/etc-file".into(), file)]).unwrap();
        let mut cpio = std::process::Command::new("cpio")
            .args(["--quiet", "-i"])
            .current_dir(dir.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let added = whole.get(empty.len()..).unwrap();
        io::Write::write_all(&mut cpio.stdin.take().unwrap(), added).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read(dir.path().join("etc-file")).unwrap(), b"12345");
    }
}
