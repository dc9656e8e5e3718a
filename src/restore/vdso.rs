//! The old kernel's vDSO, kept as plain memory whose functions jump to the new one's.

use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSymbol, SymbolKind};
use std::collections::BTreeMap;

/// `jmp [rip + 0]` and the target: what every patched function begins with.
pub const PATCH_LEN: usize = 14;

/// Why an old vDSO cannot be joined to the new one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VdsoError {
    /// Not an ELF image with dynamic symbols.
    #[error("The {which} vDSO cannot be parsed: {reason}")]
    Malformed {
        /// "saved" or "running kernel's".
        which: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// A function that fits no jump.
    #[error("Function {0} of the saved vDSO is too short to be forwarded")]
    TooShort(String),
    /// The new kernel dropped a function.
    #[error("Function {0} of the saved vDSO has no counterpart in this kernel's")]
    Missing(String),
}

/// Functions of a vDSO: name -> (offset, size).
///
/// # Errors
/// The bytes are no ELF image.
pub fn functions(
    which: &'static str,
    code: &[u8],
) -> Result<BTreeMap<String, (u64, u64)>, VdsoError> {
    let malformed = |reason: object::Error| VdsoError::Malformed {
        which,
        reason: reason.to_string(),
    };
    let file = ElfFile64::<Endianness>::parse(code).map_err(malformed)?;
    let mut found = BTreeMap::new();
    for symbol in file.dynamic_symbols() {
        if symbol.kind() != SymbolKind::Text || symbol.is_undefined() {
            continue;
        }
        let name = symbol.name().map_err(malformed)?.to_owned();
        found.insert(name, (symbol.address(), symbol.size()));
    }
    Ok(found)
}

/// The saved code with each function's first bytes replaced by a jump to the same function
/// of `new`, mapped at `new_addr`.
///
/// # Errors
/// One of them is no vDSO, or a function has no counterpart.
pub fn forward(saved: &[u8], new: &[u8], new_addr: u64) -> Result<Vec<u8>, VdsoError> {
    let targets = functions("running kernel's", new)?;
    let mut patched = saved.to_vec();
    for (name, (offset, size)) in functions("saved", saved)? {
        // Not time: only programs that set up an enclave call it, with its own conventions.
        if name == "__vdso_sgx_enter_enclave" {
            continue;
        }
        let (target, _) = targets
            .get(&name)
            .ok_or_else(|| VdsoError::Missing(name.clone()))?;
        let place = usize::try_from(offset)
            .ok()
            .and_then(|at| patched.get_mut(at..at + PATCH_LEN))
            .filter(|_| size >= PATCH_LEN as u64)
            .ok_or_else(|| VdsoError::TooShort(name.clone()))?;
        place.copy_from_slice(&jump(new_addr + target));
    }
    Ok(patched)
}

fn jump(target: u64) -> [u8; PATCH_LEN] {
    let mut code = [0; PATCH_LEN];
    code[..2].copy_from_slice(&[0xff, 0x25]);
    code[6..].copy_from_slice(&target.to_le_bytes());
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of this process's own vDSO.
    fn own() -> Vec<u8> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|l| l.ends_with("[vdso]")).unwrap();
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        let this = crate::model::ids::Pid(std::process::id().cast_signed());
        crate::sys::process::read_memory_exact(this, start, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_clock_is_forwarded() {
        let vdso = own();
        let names = functions("saved", &vdso).unwrap();
        let (offset, _) = names["__vdso_clock_gettime"];
        let patched = forward(&vdso, &vdso, 0x7000_0000).unwrap();
        let at = usize::try_from(offset).unwrap();
        assert_eq!(patched[at..at + 14], jump(0x7000_0000 + offset));
        assert_eq!(patched.len(), vdso.len());
    }

    #[test]
    fn only_function_entries_change() {
        let vdso = own();
        let patched = forward(&vdso, &vdso, 0x7000_0000).unwrap();
        let entries = functions("saved", &vdso).unwrap();
        for (i, (old, new)) in vdso.iter().zip(&patched).enumerate() {
            let in_entry = entries
                .values()
                .any(|(at, _)| (*at..at + PATCH_LEN as u64).contains(&(i as u64)));
            assert!(old == new || in_entry, "byte {i}");
        }
    }

    #[test]
    fn damage_is_an_error() {
        let vdso = own();
        assert!(matches!(
            forward(b"not an ELF image", &vdso, 0),
            Err(VdsoError::Malformed { which: "saved", .. })
        ));
        assert!(matches!(
            forward(&vdso, &vdso[..70], 0),
            Err(VdsoError::Malformed { .. })
        ));
    }
}
