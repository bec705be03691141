//! What the guest's CPUID says: what KVM supports, less what we keep from the guest.
//!
//! One socket with one thread a core. VMX and SVM are hidden unless asked for: a guest that runs
//! guests has contexts that cannot be judged from outside.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::start::StartError;

const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Flexible return and event delivery: what we know of system call entries would not hold.
const FRED: u32 = 1 << 17;
/// Levels of the extended topology leaves (SDM vol. 2A, CPUID leaf 0xb).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// The table for vCPU `index` of `cpus`, from `supported`.
pub(super) fn for_vcpu(
    supported: &CpuId,
    index: u32,
    cpus: u32,
    tsc_deadline: bool,
    nested: bool,
) -> CpuId {
    let mut table = supported.clone();
    let core_bits = u32::BITS - (cpus - 1).leading_zeros();
    table.retain(|entry| nested || entry.function != 0x8000_000a);
    add_topology(&mut table);
    for entry in table.as_mut_slice() {
        adjust(entry, index, cpus, core_bits, nested);
        if entry.function == 1 && tsc_deadline {
            entry.ecx |= TSC_DEADLINE;
        }
    }
    table
}

/// Gives both topology leaves the sub-leaves that [`adjust`] fills: KVM from 6.2 on returns the
/// first one only, and leaves the rest to us.
fn add_topology(table: &mut CpuId) {
    for function in TOPOLOGY {
        if !table
            .as_slice()
            .iter()
            .any(|entry| entry.function == function)
        {
            continue;
        }
        table.retain(|entry| entry.function != function);
        for index in 0..3 {
            let leaf = kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                ..kvm_cpuid_entry2::default()
            };
            if table.push(leaf).is_err() {
                tracing::debug!("no room for CPUID leaf {function:#x}");
            }
        }
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, index: u32, cpus: u32, core_bits: u32, nested: bool) {
    let byte = |value: u32| value.min(255);
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (byte(index) << 24) | (byte(cpus) << 16);
            entry.ecx |= HYPERVISOR;
            if !nested {
                entry.ecx &= !VMX;
            }
            entry.edx = if cpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Deterministic cache parameters: cores in the package, threads that share the cache.
        4 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level < 3 { 0 } else { (1 << core_bits) - 1 };
            let cores = ((1_u32 << core_bits) - 1).min(63);
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
        }
        0xb | 0x1f => {
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, (LEVEL_SMT << 8)),
                1 => (core_bits, cpus, (LEVEL_CORE << 8) | 1),
                level => (0, 0, level & 0xff),
            };
            entry.edx = index;
        }
        7 if entry.index == 1 => entry.eax &= !FRED,
        0x8000_0001 if !nested => entry.ecx &= !SVM,
        0x8000_0008 => {
            entry.ecx = (entry.ecx & 0xffff_0f00) | (core_bits << 12) | byte(cpus - 1);
        }
        0x8000_001d => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level < 3 { 0 } else { cpus - 1 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        0x8000_001e => {
            entry.eax = index;
            entry.ebx = byte(index);
            entry.ecx = 0;
        }
        _ => {}
    }
    if entry.function == 0x8000_0001 && cpus == 1 {
        entry.ecx &= !TOPOLOGY_EXTENSIONS;
    }
}

/// What this host's KVM supports, and whether it has the TSC deadline timer.
pub(super) fn supported(kvm: &Kvm) -> Result<(CpuId, bool), StartError> {
    let table = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(StartError::kvm("reading the supported CPUID"))?;
    Ok((table, kvm.check_extension(Cap::TscDeadlineTimer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn table(nested: bool) -> CpuId {
        let entries = [
            entry(1, 0),
            entry(0xb, 0),
            entry(0x8000_0001, 0),
            entry(0x8000_000a, 0),
        ];
        for_vcpu(&CpuId::from_entries(&entries).unwrap(), 2, 4, true, nested)
    }

    #[test]
    fn virtualisation_is_hidden_unless_asked_for() {
        let find = |table: &CpuId, function| {
            table
                .as_slice()
                .iter()
                .find(|entry| entry.function == function)
                .copied()
        };
        let hidden = table(false);
        assert_eq!(find(&hidden, 1).unwrap().ecx & VMX, 0);
        assert_eq!(find(&hidden, 0x8000_0001).unwrap().ecx & SVM, 0);
        assert!(find(&hidden, 0x8000_000a).is_none());
        let shown = table(true);
        assert_ne!(find(&shown, 1).unwrap().ecx & VMX, 0);
        assert!(find(&shown, 0x8000_000a).is_some());
    }

    #[test]
    fn each_vcpu_has_its_apic_id() {
        let table = table(false);
        let leaf = |index| {
            *table
                .as_slice()
                .iter()
                .find(|e| e.function == 0xb && e.index == index)
                .unwrap()
        };
        assert_eq!(leaf(0).edx, 2);
        assert_eq!((leaf(1).eax, leaf(1).ebx), (2, 4));
    }
}
