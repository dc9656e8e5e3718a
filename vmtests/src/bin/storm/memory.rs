//! Mappings, all in a range of addresses that nothing else uses.

use crate::random::Random;
use crate::sys::{call, close};
use std::hint::black_box;
use std::os::raw::{c_int, c_void};
use std::ptr::null_mut;

/// Far from where the kernel puts mappings that ask for no address.
const ARENA: usize = 0x2000_0000_0000;
const PAGES: u64 = 512;
const PAGE: usize = 4096;

const ADVICE: [c_int; 18] = [
    libc::MADV_NORMAL,
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_DONTNEED,
    libc::MADV_FREE,
    libc::MADV_DONTFORK,
    libc::MADV_DOFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_DODUMP,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_MERGEABLE,
    libc::MADV_UNMERGEABLE,
    libc::MADV_WIPEONFORK,
    libc::MADV_KEEPONFORK,
    libc::MADV_POPULATE_WRITE,
    libc::MADV_WILLNEED,
    libc::MADV_COLD,
];

/// Some pages of the arena.
fn range(random: &mut Random) -> (*mut c_void, usize) {
    let first = random.below(PAGES);
    let pages = 1 + random.below(12).min(PAGES - first - 1);
    let bytes = |pages: u64| usize::try_from(pages).expect("small") * PAGE;
    let start = std::ptr::without_provenance_mut(ARENA + bytes(first));
    (start, bytes(pages))
}

fn protection(random: &mut Random) -> c_int {
    // Executable memory is refused by some policies, and writable is never both here.
    random.pick(&[
        libc::PROT_NONE,
        libc::PROT_READ,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::PROT_READ | libc::PROT_EXEC,
    ])
}

pub fn step(random: &mut Random) {
    let (at, len) = range(random);
    let prot = protection(random);
    match random.below(30) {
        0..7 => {
            let kind = random.pick(&[libc::MAP_PRIVATE, libc::MAP_PRIVATE, libc::MAP_SHARED]);
            let extra = random.pick(&[0, 0, libc::MAP_NORESERVE, libc::MAP_LOCKED]);
            map(at, len, prot, kind | extra | libc::MAP_ANONYMOUS, -1, 0);
        }
        7..10 => map_file(random, at, len, prot),
        10..14 => {
            call!(libc::munmap(at, len));
        }
        14..18 => {
            call!(libc::mprotect(at, len, prot));
        }
        18..21 => {
            let (to, new) = range(random);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // One range must not touch the other, or the kernel refuses.
            call!(libc::mremap(at, len, new, flags, to));
        }
        21..23 => {
            call!(libc::mlock(at, len));
        }
        23..24 => {
            call!(libc::munlock(at, len));
        }
        24..28 => {
            call!(libc::madvise(at, len, random.pick(&ADVICE)));
        }
        28 => {
            const PR_SET_VMA: c_int = 0x5356_4d41;
            let name = c"storm".as_ptr();
            call!(libc::prctl(PR_SET_VMA, 0, at, len, name));
        }
        _ => attach(at),
    }
}

fn map(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) {
    call!(libc::mmap(
        at,
        len,
        prot,
        flags | libc::MAP_FIXED,
        fd,
        offset
    ));
}

fn map_file(random: &mut Random, at: *mut c_void, len: usize, prot: c_int) {
    let kind = random.pick(&[libc::MAP_PRIVATE, libc::MAP_SHARED]);
    let page = i64::try_from(random.below(4)).expect("small");
    let fd = if random.coin() {
        let fd = call!(libc::memfd_create(c"storm".as_ptr(), libc::MFD_CLOEXEC));
        call!(libc::ftruncate(fd, 65536));
        fd
    } else {
        call!(libc::open(c"/bin/true".as_ptr(), libc::O_RDONLY))
    };
    map(at, len, prot, kind, fd, page * 4096);
    close(fd);
}

/// System V shared memory, which goes with its last mapping.
fn attach(at: *mut c_void) {
    let id = call!(libc::shmget(libc::IPC_PRIVATE, 2 * PAGE, 0o600));
    if id >= 0 {
        call!(libc::shmat(id, at, libc::SHM_REMAP));
        call!(libc::shmctl(id, libc::IPC_RMID, null_mut()));
    }
}

/// Grows and shrinks the heap; nothing is allocated in between.
pub fn use_brk(random: &mut Random) {
    let pages = usize::try_from(1 + random.below(20)).expect("small");
    let stay = random.coin();
    let old = call!(libc::sbrk(0));
    call!(libc::brk(old.wrapping_byte_add(pages * PAGE)));
    if !stay {
        call!(libc::brk(old.wrapping_byte_add(PAGE)));
    }
}

/// All mappings at once.
pub fn lock_all(random: &mut Random) {
    if random.coin() {
        call!(libc::mlockall(libc::MCL_CURRENT | libc::MCL_ONFAULT));
    } else {
        call!(libc::munlockall());
    }
}

/// Makes the stack of the first thread grow.
pub fn use_stack(depth: u32) {
    let room = [0u8; 16384];
    black_box(&room);
    if depth > 0 {
        use_stack(depth - 1);
    }
    black_box(&room);
}
