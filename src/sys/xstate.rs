//! Extended registers: from the form the kernel keeps them in to the one that user space sees.
//!
//! A kernel saves a thread's XSAVE area in the *standard* format, in which each component has a
//! place of its own, or in the *compacted* one (XSAVEC, XSAVES), in which those that are saved
//! follow each other (Intel SDM volume 1, 13.4). ptrace(2) always gives the standard one, with the
//! initial configuration of what is not in use spelt out: so does this.

use std::sync::OnceLock;

/// Bits of components in masks of them.
const FP: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const PKRU: usize = 9;
/// Components from here on follow the legacy area and the header.
const FIRST_EXTENDED: usize = 2;

/// Ranges of the legacy area (FXSAVE).
const CONTROL: std::ops::Range<usize> = 0..24;
const MXCSR: std::ops::Range<usize> = 24..32;
const ST: std::ops::Range<usize> = 32..160;
const XMM: std::ops::Range<usize> = 160..416;
/// Where software notes which features the kernel uses (xcr0).
const XCR0: usize = 464;
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const HEADER_END: usize = 576;
/// Of `XCOMP_BV`: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// Initial values of the control word and of MXCSR.
const FCW: u16 = 0x37f;
const INITIAL_MXCSR: u32 = 0x1f80;

/// One component beyond the legacy area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    size: usize,
    /// In the standard format.
    offset: usize,
    /// To 64 bytes in the compacted format.
    aligned: bool,
}

/// How this processor lays areas out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    components: [Component; 63],
    /// Of an area in the standard format, with all components that the kernel has enabled.
    size: usize,
    /// Which these are.
    enabled: u64,
}

impl Layout {
    /// That of this processor, if it has XSAVE and the kernel uses it.
    #[must_use]
    pub fn ours() -> Option<&'static Self> {
        static OURS: OnceLock<Option<Layout>> = OnceLock::new();
        OURS.get_or_init(Self::read).as_ref()
    }

    #[cfg(target_arch = "x86_64")]
    fn read() -> Option<Self> {
        use std::arch::x86_64::{__cpuid_count, _xgetbv};
        const XSAVE_LEAF: u32 = 0xd;
        if !std::is_x86_feature_detected!("xsave") {
            return None;
        }
        // SAFETY: it has XSAVE, and the detection above asks for OSXSAVE, too.
        let enabled = unsafe { _xgetbv(0) };
        let mut components = [Component::default(); 63];
        for (bit, component) in (0_u32..).zip(&mut components).skip(FIRST_EXTENDED) {
            let told = __cpuid_count(XSAVE_LEAF, bit);
            *component = Component {
                size: told.eax as usize,
                offset: told.ebx as usize,
                aligned: told.ecx & 2 != 0,
            };
        }
        Some(Self {
            components,
            size: __cpuid_count(XSAVE_LEAF, 0).ebx as usize,
            enabled,
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn read() -> Option<Self> {
        None
    }

    /// An area as the kernel keeps it, in the standard format, with the components among `user`
    /// alone: the others are the kernel's own. `pkru` is kept apart by it.
    ///
    /// Returns `None` for what is no such area.
    #[must_use]
    pub fn standard(&self, kept: &[u8], user: u64, pkru: u32) -> Option<Vec<u8>> {
        let present = word(kept, XSTATE_BV)? & user;
        let compacted = word(kept, XCOMP_BV)?;
        let mut area = vec![0; self.size.max(HEADER_END)];
        area[..2].copy_from_slice(&FCW.to_le_bytes());
        area[MXCSR.start..][..4].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
        let legacy = [(FP, CONTROL), (SSE | AVX, MXCSR), (FP, ST), (SSE, XMM)];
        for (_, range) in legacy.into_iter().filter(|(bits, _)| present & bits != 0) {
            area[range.clone()].copy_from_slice(kept.get(range)?);
        }
        area[XCR0..][..8].copy_from_slice(&self.enabled.to_le_bytes());
        area[XSTATE_BV..][..8].copy_from_slice(&present.to_le_bytes());
        let mut next = HEADER_END;
        for (number, component) in self.components.iter().enumerate().skip(FIRST_EXTENDED) {
            let from = if compacted & COMPACTED == 0 {
                component.offset
            } else if compacted >> number & 1 == 0 {
                continue;
            } else {
                let from = if component.aligned {
                    next.next_multiple_of(64)
                } else {
                    next
                };
                next = from + component.size;
                from
            };
            if present >> number & 1 == 0 {
                continue;
            }
            let to = area.get_mut(component.offset..component.offset + component.size)?;
            to.copy_from_slice(kept.get(from..from + component.size)?);
            if number == PKRU {
                to.fill(0);
                to.first_chunk_mut::<4>()
                    .map(|to| *to = pkru.to_le_bytes())?;
            }
        }
        Some(area)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let chunk = bytes.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AVX, a component of the kernel's own, PKRU, and one that is aligned when compacted.
    fn layout() -> Layout {
        let mut components = [Component::default(); 63];
        let component = |size, offset, aligned| Component {
            size,
            offset,
            aligned,
        };
        components[2] = component(16, 576, false);
        components[PKRU] = component(8, 600, false);
        components[11] = component(24, 0, false);
        components[17] = component(8, 640, true);
        Layout {
            components,
            size: 648,
            enabled: USER,
        }
    }

    const USER: u64 = FP | SSE | AVX | 1 << PKRU | 1 << 17;

    fn kept(present: u64, compacted: u64, rest: &[u8]) -> Vec<u8> {
        let mut kept: Vec<u8> = (1..=251).cycle().take(HEADER_END).collect();
        kept[XSTATE_BV..][..8].copy_from_slice(&present.to_le_bytes());
        kept[XCOMP_BV..][..8].copy_from_slice(&compacted.to_le_bytes());
        kept.extend(rest);
        kept
    }

    #[test]
    fn a_compacted_area_is_laid_out() {
        let all = USER | 1 << 11;
        let mut rest = vec![2; 16];
        rest.extend([9; 8]);
        rest.extend([11; 24]);
        rest.resize(64, 0xee);
        rest.extend([17; 8]);
        let kept = kept(all, COMPACTED | all, &rest);
        let area = layout().standard(&kept, USER, 0x0403_0201).unwrap();
        assert_eq!(area.len(), 648);
        assert_eq!(area[..416], kept[..416]);
        assert_eq!(area[416..XCR0], [0; XCR0 - 416]);
        assert_eq!(word(&area, XCR0), Some(USER));
        assert_eq!(word(&area, XSTATE_BV), Some(USER));
        assert_eq!(area[XCOMP_BV..HEADER_END], [0; 56]);
        assert_eq!(area[576..592], [2; 16]);
        assert_eq!(area[592..600], [0; 8]);
        assert_eq!(area[600..608], [1, 2, 3, 4, 0, 0, 0, 0]);
        assert_eq!(area[608..640], [0; 32]);
        assert_eq!(area[640..648], [17; 8]);
    }

    #[test]
    fn a_standard_area_keeps_its_places() {
        let mut rest = vec![0xee; 72];
        rest[..16].fill(2);
        rest[64..].fill(17);
        let kept = kept(AVX | 1 << 17, 0, &rest);
        let area = layout().standard(&kept, USER, 1).unwrap();
        // Not in use, though something is left in memory: as it is to begin with.
        assert_eq!(area[..4], [0x7f, 3, 0, 0]);
        assert_eq!(area[ST], [0; 128]);
        assert_eq!(area[XMM], [0; 256]);
        assert_eq!(area[600..608], [0; 8]);
        // In use with AVX.
        assert_eq!(area[MXCSR], kept[MXCSR]);
        assert_eq!(area[576..592], [2; 16]);
        assert_eq!(area[640..648], [17; 8]);
    }

    #[test]
    fn what_was_not_saved_is_as_it_is_to_begin_with() {
        let kept = kept(0, COMPACTED | USER, &[0xee; 72]);
        let area = layout().standard(&kept, USER, 1).unwrap();
        assert_eq!(area[..2], [0x7f, 3]);
        assert_eq!(area[24..28], [0x80, 0x1f, 0, 0]);
        assert_eq!(area[HEADER_END..], [0; 72]);
    }

    #[test]
    fn what_is_cut_off_is_no_area() {
        let whole = kept(USER, COMPACTED | USER, &[1; 72]);
        assert!(layout().standard(&whole, USER, 1).is_some());
        for cut in 0..whole.len() {
            assert_eq!(layout().standard(&whole[..cut], USER, 1), None, "{cut}");
        }
    }
}
