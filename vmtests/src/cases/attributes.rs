//! Attributes that few programs have: limits, NUMA policies, prctl(2), the login UID, keyrings, and what
//! memory is told.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::mman::MapFlags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::child::Child;
use super::memory::{PAGE, Pages};
use super::probe::{join, smaps_at, sys, vm_flags_at};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("attributes_limits", limits),
    Entry::carried("attributes_numa", numa),
    Entry::carried("attributes_prctl", controls),
    Entry::carried("attributes_login", login),
    Entry::carried("attributes_keyring", keyring),
    Entry::carried("memory_pkeys", pkeys),
    Entry::carried("memory_locked_on_fault", locked_on_fault),
    Entry::carried("memory_droppable", droppable),
];

const MPOL_BIND: i32 = 2;
const MPOL_INTERLEAVE: i32 = 3;
const MPOL_F_STATIC_NODES: i32 = 1 << 15;

/// What get_mempolicy(2) says: mode and nodes, of this thread or of an address.
fn policy(at: Option<usize>) -> Result<(i32, u64)> {
    const MPOL_F_ADDR: usize = 2;
    let (mut mode, mut nodes) = (0_i32, [0_u64; 16]);
    let flags = if at.is_some() { MPOL_F_ADDR } else { 0 };
    // SAFETY: the kernel fills the mode and 1024 bits of nodes.
    let got = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.as_mut_ptr(),
            nodes.len() * 64,
            at.unwrap_or(0),
            flags,
        )
    };
    sys("get_mempolicy", got)?;
    Ok((mode, nodes[0]))
}

/// A policy of a thread and one of a mapping; others have none.
fn numa(case: &Case) -> Result<()> {
    const HOME_NODE: i64 = 450;
    const BITS: usize = 65;
    let first: u64 = 1;
    let mut bound = Pages::new(16 * PAGE, MapFlags::MAP_PRIVATE)?;
    let mut free = Pages::new(16 * PAGE, MapFlags::MAP_PRIVATE)?;
    let (at, length) = (bound.write(0, PAGE).as_ptr().addr(), 16 * PAGE);
    // SAFETY: the kernel reads one word of nodes.
    sys("mbind", unsafe {
        let nodes = &raw const first;
        libc::syscall(libc::SYS_mbind, at, length, MPOL_BIND, nodes, BITS, 0)
    })?;
    // SAFETY: takes integers.
    sys("set_mempolicy_home_node", unsafe {
        libc::syscall(HOME_NODE, at, length, 0, 0)
    })?;
    bound.write(0, PAGE).fill(7);
    free.write(0, PAGE).fill(8);
    let child = Child::start(case.dir(), "interleaving", |turn| {
        let mode = MPOL_INTERLEAVE | MPOL_F_STATIC_NODES;
        // SAFETY: as above.
        sys("set_mempolicy", unsafe {
            libc::syscall(libc::SYS_set_mempolicy, mode, &raw const first, BITS)
        })?;
        turn.wait();
        let found = policy(None)?;
        ensure!(found == (mode, 1), "The policy is {found:x?}");
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    let found = policy(Some(at))?;
    ensure!(found == (MPOL_BIND, 1), "The mapping's policy is {found:?}");
    let found = policy(Some(free.read(0, PAGE).as_ptr().addr()))?;
    ensure!(found == (0, 0), "The other mapping's policy is {found:?}");
    ensure!(policy(None)? == (0, 0), "The thread has a policy");
    ensure!(bound.read(0, PAGE).iter().all(|byte| *byte == 7));
    ensure!(free.read(0, PAGE).iter().all(|byte| *byte == 8));
    child.finish()
}

/// prctl(2) with an argument.
fn control(option: i32, argument: usize) -> nix::Result<i32> {
    // SAFETY: none of the options used here takes a pointer.
    Errno::result(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

/// As [`control`], where this kernel knows the option.
fn try_control(option: i32, argument: usize) -> Result<bool> {
    match control(option, argument) {
        Ok(_) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno).with_context(|| format!("prctl {option}")),
    }
}

/// Attributes of threads and of the address space that prctl(2) sets.
fn controls(case: &Case) -> Result<()> {
    const PR_SET_IO_FLUSHER: i32 = 57;
    const PR_GET_IO_FLUSHER: i32 = 58;
    const PR_SET_MEMORY_MERGE: i32 = 67;
    const PR_GET_MEMORY_MERGE: i32 = 68;
    let of_thread = || -> Result<(i32, i32)> {
        let flusher = control(PR_GET_IO_FLUSHER, 0)?;
        Ok((flusher, control(libc::PR_MCE_KILL_GET, 0)?))
    };
    let (told, ready) = std::sync::mpsc::channel();
    let (go, end) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || -> Result<()> {
        let early = usize::try_from(libc::PR_MCE_KILL_EARLY)?;
        // SAFETY: takes integers.
        let set = unsafe { libc::prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, early, 0, 0) };
        sys("PR_MCE_KILL", set.into())?;
        told.send(())?;
        end.recv()?;
        let found = of_thread()?;
        ensure!(found == (0, libc::PR_MCE_KILL_EARLY), "It has {found:?}");
        Ok(())
    });
    ready.recv()?;
    // Now that the other thread does not inherit it.
    control(PR_SET_IO_FLUSHER, 1).context("PR_SET_IO_FLUSHER")?;
    let merges = try_control(PR_SET_MEMORY_MERGE, 1)?;
    let refuse = usize::try_from(libc::PR_MDWE_REFUSE_EXEC_GAIN)?;
    let hardened = try_control(libc::PR_SET_MDWE, refuse)?;
    case.ready()?;
    let found = of_thread()?;
    ensure!(found == (1, libc::PR_MCE_KILL_DEFAULT), "It has {found:?}");
    if merges {
        ensure!(
            control(PR_GET_MEMORY_MERGE, 0) == Ok(1),
            "It merges no more"
        );
    }
    if hardened {
        let found = control(libc::PR_GET_MDWE, 0);
        ensure!(found == Ok(1), "PR_GET_MDWE: {found:?}");
        let flags = MapFlags::MAP_PRIVATE;
        let mut pages = Pages::new(PAGE, flags)?;
        let at = pages.write(0, PAGE).as_mut_ptr();
        // SAFETY: the call fails.
        let made = unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_EXEC) };
        ensure!(made == -1, "Written memory can be executed");
    }
    go.send(())?;
    join("the other thread", other)
}

/// Processes of users that have logged in, and one of nobody.
fn login(case: &Case) -> Result<()> {
    const PATH: &str = "/proc/self/loginuid";
    const NOBODY: u32 = u32::MAX;
    let read = || -> Result<u32> { Ok(fs::read_to_string(PATH)?.trim_end().parse()?) };
    let write = |uid: u32| fs::write(PATH, uid.to_string()).context(PATH);
    let start = |name: &str, uid: u32| {
        Child::start(case.dir(), name, |turn| {
            write(uid)?;
            turn.wait();
            ensure!(read()? == uid, "The login UID is {}", read()?);
            Ok(())
        })
    };
    write(1000)?;
    let children = [
        start("another", 1001)?,
        start("same", 1000)?,
        start("nobody", NOBODY)?,
    ];
    for child in &children {
        child.waits()?;
    }
    case.ready()?;
    ensure!(read()? == 1000, "The login UID is {}", read()?);
    children.into_iter().try_for_each(Child::finish)
}

/// A session keyring as services have one, with nothing in it but what systemd puts there.
fn keyring(case: &Case) -> Result<()> {
    const JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: without a name.
    sys("keyctl", unsafe {
        libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0)
    })?;
    add_key(c"invocation_id", SESSION_KEYRING)?;
    case.ready()
}

/// `KEY_SPEC_PROCESS_KEYRING`.
pub(super) const PROCESS_KEYRING: i32 = -2;
/// `KEY_SPEC_SESSION_KEYRING`.
pub(super) const SESSION_KEYRING: i32 = -3;

/// Adds a key of one byte to a keyring.
pub(super) fn add_key(name: &std::ffi::CStr, keyring: i32) -> Result<i64> {
    // SAFETY: the strings are C strings, and the payload is of one byte.
    sys("add_key", unsafe {
        let kind = c"user".as_ptr();
        libc::syscall(
            libc::SYS_add_key,
            kind,
            name.as_ptr(),
            b"x".as_ptr(),
            1,
            keyring,
        )
    })
}

/// What this thread may not do with memory of each key: two bits for each.
fn rights() -> u32 {
    let rights: u32;
    // SAFETY: reads a register that every processor with keys has.
    unsafe {
        std::arch::asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _);
    }
    rights
}

/// Protection keys with a gap between them, and memory that one of them closes.
fn pkeys(case: &Case) -> Result<()> {
    const DISABLE_ACCESS: u64 = 1;
    // SAFETY: takes integers.
    let alloc = |rights: u64| unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, rights) };
    let keys = [alloc(0), alloc(0), alloc(DISABLE_ACCESS)];
    ensure!(keys == [1, 2, 3], "The keys are {keys:?}");
    // SAFETY: as above.
    let free = |key: i64| unsafe { libc::syscall(libc::SYS_pkey_free, key) };
    sys("pkey_free", free(2))?;
    let mut pages = Pages::new(4 * PAGE, MapFlags::MAP_PRIVATE)?;
    pages.write(0, 4 * PAGE).fill(6);
    let at = pages.read(0, PAGE).as_ptr().addr();
    let protect = |at: usize, key: i64| {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: nobody has a reference to what is closed.
        sys("pkey_mprotect", unsafe {
            libc::syscall(libc::SYS_pkey_mprotect, at, PAGE, prot, key)
        })
    };
    protect(at, 1)?;
    protect(at + PAGE, 3)?;
    let before = rights();
    case.ready()?;
    ensure!(
        rights() == before,
        "Rights: {before:#x}, now {:#x}",
        rights()
    );
    let key_of = |at| smaps_at(at, "ProtectionKey:");
    let found = [key_of(at)?, key_of(at + PAGE)?, key_of(at + 2 * PAGE)?];
    ensure!(found == ["1", "3", "0"], "The keys are {found:?}");
    protect(at + PAGE, 0)?;
    ensure!(pages.read(0, 4 * PAGE).iter().all(|byte| *byte == 6));
    ensure!(free(3) == 0 && free(1) == 0, "A key was not given out");
    ensure!(free(2) == -1, "A key came back");
    Ok(())
}

/// Memory that is locked page by page as it comes: what was never touched is still not there.
fn locked_on_fault(case: &Case) -> Result<()> {
    const COUNT: usize = 64;
    const MLOCK_ONFAULT: i32 = 1;
    let mut pages = Pages::new(COUNT * PAGE, MapFlags::MAP_PRIVATE)?;
    let at = pages.read(0, PAGE).as_ptr().addr();
    // SAFETY: takes integers.
    sys("mlock2", unsafe {
        libc::syscall(libc::SYS_mlock2, at, COUNT * PAGE, MLOCK_ONFAULT)
    })?;
    for page in [0, 9, 63] {
        pages.write(page * PAGE, PAGE).fill(9);
    }
    case.ready()?;
    let mut resident = [0_u8; COUNT];
    // SAFETY: one byte for each page.
    let got =
        unsafe { libc::mincore(at as *mut libc::c_void, COUNT * PAGE, resident.as_mut_ptr()) };
    sys("mincore", got.into())?;
    let there: Vec<usize> = (0..COUNT).filter(|page| resident[*page] & 1 != 0).collect();
    ensure!(there == [0, 9, 63], "There are the pages {there:?}");
    for page in there {
        ensure!(pages.read(page * PAGE, PAGE).iter().all(|byte| *byte == 9));
    }
    let flags = vm_flags_at(at)?;
    ensure!(flags.contains(&"lo".to_owned()), "It is {flags:?}");
    Ok(())
}

/// Memory that the kernel may drop, as the C library has it for random numbers.
fn droppable(case: &Case) -> Result<()> {
    const MAP_DROPPABLE: i32 = 8;
    let flags = MAP_DROPPABLE | libc::MAP_ANONYMOUS;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel chooses an unused place.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, prot, flags, -1, 0) };
    let made = at != libc::MAP_FAILED;
    if !made {
        // Before 6.11.
        let errno = Errno::last();
        ensure!(errno == Errno::EINVAL, "mmap: {errno}");
    }
    case.ready()?;
    if made {
        let flags = vm_flags_at(at.addr())?;
        ensure!(flags.contains(&"dp".to_owned()), "It is {flags:?}");
        // SAFETY: mapped, and ours.
        unsafe { at.cast::<u8>().write_volatile(1) };
    }
    Ok(())
}

/// Resource limits, soft and hard.
fn limits(case: &Case) -> Result<()> {
    let wanted = [
        (Resource::RLIMIT_NOFILE, 300, 400),
        (Resource::RLIMIT_CORE, 0, 12_345),
        (Resource::RLIMIT_STACK, 4 << 20, 16 << 20),
        (Resource::RLIMIT_MEMLOCK, 8192, 65_536),
        (Resource::RLIMIT_NPROC, 1000, 2000),
        (Resource::RLIMIT_FSIZE, 1 << 30, 1 << 31),
        (Resource::RLIMIT_AS, 1 << 33, 1 << 34),
        (Resource::RLIMIT_CPU, 100_000, 200_000),
        (Resource::RLIMIT_SIGPENDING, 55, 66),
    ];
    let dir = case.dir().to_owned();
    let child = Child::start(&dir, "limits", |turn| {
        for (resource, soft, hard) in wanted {
            setrlimit(resource, soft, hard).with_context(|| format!("Set {resource:?}"))?;
        }
        turn.wait();
        for (resource, soft, hard) in wanted {
            let now = getrlimit(resource)?;
            ensure!(
                now == (soft, hard),
                "{resource:?} was {:?}, is {now:?}",
                (soft, hard)
            );
        }
        ensure!(
            (0..500)
                .map(|_| fs::File::open("/dev/null"))
                .collect::<Result<Vec<_>, _>>()
                .is_err(),
            "The limit of open files has no effect"
        );
        Ok(())
    })?;
    child.waits()?;
    let before = getrlimit(Resource::RLIMIT_NOFILE)?;
    case.ready()?;
    ensure!(
        getrlimit(Resource::RLIMIT_NOFILE)? == before,
        "The parent's limit has changed"
    );
    child.finish()
}
