//! Where a kernel keeps its log and its panic state.

use crate::Kernel;
use crate::guest::LinkAddr;
use crate::symbols::SiteError;
use crate::types::{TypeError, Types};

/// What a kernel's file lacks.
#[derive(Debug, thiserror::Error)]
pub enum LogLayoutError {
    /// A symbol.
    #[error("the kernel's log cannot be found")]
    Symbol(#[from] SiteError),
    /// A type or one of its members.
    #[error("the kernel's log has an unknown layout")]
    Type(#[from] TypeError),
}

/// Addresses and offsets in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogLayout {
    /// The variable `prb`, which points to the ring.
    pub(super) ring: LinkAddr,
    pub(super) panic_cpu: LinkAddr,
    pub(super) count_bits: u64,
    pub(super) descriptors: u64,
    pub(super) infos: u64,
    pub(super) head_id: u64,
    pub(super) size_bits: u64,
    pub(super) data: u64,
    pub(super) descriptor_size: u64,
    pub(super) state: u64,
    pub(super) begin: u64,
    pub(super) next: u64,
    pub(super) info_size: u64,
    pub(super) sequence: u64,
    pub(super) nanoseconds: u64,
    pub(super) text_len: u64,
    pub(super) text_len_size: u64,
}

impl LogLayout {
    pub(super) fn of(kernel: &Kernel) -> Result<Self, LogLayoutError> {
        let types: &Types = kernel.types();
        let ring = |path: &str| {
            types
                .field("printk_ringbuffer", path)
                .map(|field| field.offset)
        };
        let descriptor = |path: &str| types.field("prb_desc", path).map(|field| field.offset);
        let info = |path: &str| types.field("printk_info", path);
        let text_len = info("text_len")?;
        Ok(Self {
            ring: kernel.symbols().address("prb")?,
            panic_cpu: kernel.symbols().address("panic_cpu")?,
            count_bits: ring("desc_ring.count_bits")?,
            descriptors: ring("desc_ring.descs")?,
            infos: ring("desc_ring.infos")?,
            head_id: ring("desc_ring.head_id")?,
            size_bits: ring("text_data_ring.size_bits")?,
            data: ring("text_data_ring.data")?,
            descriptor_size: types.size_of("prb_desc")?,
            state: descriptor("state_var")?,
            begin: descriptor("text_blk_lpos.begin")?,
            next: descriptor("text_blk_lpos.next")?,
            info_size: types.size_of("printk_info")?,
            sequence: info("seq")?.offset,
            nanoseconds: info("ts_nsec")?.offset,
            text_len: text_len.offset,
            text_len_size: text_len.size,
        })
    }
}
