//! What the next kernel can do for the applications, by the version it says it has.

use crate::sys::uring;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// From this version on the kernel takes the word of a BPF program for the end of a handshake
/// ([`Handshakes`](crate::bpf::accept::Handshakes)).
const VOUCHING_SINCE: (u32, u32) = (6, 9);

/// From this version on the positions of both rings lie side by side; before, each had a cache
/// line of its own (`struct io_uring` of include/linux/io_uring_types.h).
const COMPACT_SINCE: (u32, u32) = (6, 6);

/// Why connections that nobody has accepted cannot be made again by the kernel in this file; `None`
/// if they can.
#[must_use]
pub fn refuses_accept_queues(kernel: &Path) -> Option<String> {
    let Some(release) = release(kernel) else {
        return Some("the next kernel does not say its version".to_owned());
    };
    let can = version(&release).is_some_and(|version| version >= VOUCHING_SINCE);
    (!can).then(|| {
        let (major, minor) = VOUCHING_SINCE;
        format!(
            "the next kernel, {release}, cannot make them again (Linux {major}.{minor} can); try \
             again when the application keeps up"
        )
    })
}

/// Why io_uring instances of this kernel would not be restored by the one in this file; `None`
/// if they would, or cannot be made here. User space is told once where the parts of a ring are,
/// and looks there for ever.
#[must_use]
pub fn refuses_rings(kernel: &Path) -> Option<String> {
    let compact = uring::is_compact()?;
    let Some(release) = release(kernel) else {
        return Some("the next kernel does not say its version".to_owned());
    };
    match version(&release) {
        Some(version) if (version >= COMPACT_SINCE) == compact => None,
        _ => Some(format!(
            "the next kernel, {release}, keeps rings in another form, which the application \
             would not know; close it before the update, or have the application do without \
             io_uring"
        )),
    }
}

/// The release that a kernel image says it is (Documentation/arch/x86/boot.rst, `kernel_version`).
fn release(kernel: &Path) -> Option<String> {
    const VERSION_AT: u64 = 0x20e;
    const VERSION_FROM: u64 = 0x200;
    let file = File::open(kernel).ok()?;
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0x202).ok()?;
    let mut at = [0; 2];
    file.read_exact_at(&mut at, VERSION_AT).ok()?;
    let mut text = [0; 128];
    let from = VERSION_FROM + u64::from(u16::from_le_bytes(at));
    let count = file.read_at(&mut text, from).ok()?;
    let end = text[..count]
        .iter()
        .position(|byte| [0, b' '].contains(byte));
    let release = std::str::from_utf8(&text[..end?]).ok()?;
    (&magic == b"HdrS").then(|| release.to_owned())
}

/// Major and minor number of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse);
    match (numbers.next()?, numbers.next()?) {
        (Ok(major), Ok(minor)) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(release: &str) -> Vec<u8> {
        let mut image = vec![0; 0x1000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x300_u16.to_le_bytes());
        image[0x500..0x500 + release.len()].copy_from_slice(release.as_bytes());
        image
    }

    #[test]
    fn a_kernel_image_says_its_release() {
        let mut image = image("6.12.9+deb12-cloud-amd64 (who@where) #1 SMP");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &image).unwrap();
        let found = release(file.path());
        assert_eq!(found.as_deref(), Some("6.12.9+deb12-cloud-amd64"));
        image[0x202] = 0;
        std::fs::write(file.path(), &image).unwrap();
        assert_eq!(release(file.path()), None);
        assert_eq!(release(Path::new("/missing")), None);
    }

    #[test]
    fn accept_queues_need_a_kernel_that_takes_our_word() {
        for (release, refused) in [("6.1.0-56", true), ("6.8.12", true), ("6.9.0", false)] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), image(release)).unwrap();
            let refusal = refuses_accept_queues(file.path());
            assert_eq!(refusal.is_some(), refused, "{release}: {refusal:?}");
        }
        assert!(refuses_accept_queues(Path::new("/missing")).is_some());
    }

    #[test]
    fn versions_are_numbers() {
        assert_eq!(version("6.1.0-56-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("6.12-rc1"), Some((6, 12)));
        assert_eq!(version("unknown"), None);
    }
}
