//! Attributes of threads and address spaces that are not carried; see `refused`.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::MapFlags;

use super::attributes::{PROCESS_KEYRING, SESSION_KEYRING, add_key};
use super::child::Child;
use super::memory::{PAGE, Pages};
use super::probe::sys;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::refused("refused_io_ports", "rights to I/O ports", io_ports),
    Entry::refused("refused_ldt", "local descriptor table", ldt),
    Entry::refused("refused_tls_segment", "TLS segments", tls_segment),
    Entry::refused("refused_user_dispatch", "dispatched to user", user_dispatch),
    Entry::refused("refused_no_tsc", "time stamp counter", no_tsc),
    Entry::refused("refused_landlock", "Landlock domain", landlock),
    Entry::refused("refused_process_key", "keyring of a thread", process_key),
    Entry::refused("refused_session_key", "keys in the session", session_key),
    Entry::refused("refused_pkey", "memory protection keys", pkey),
    Entry::refused("refused_shared_policy", "NUMA-bound shared", shared_policy),
    Entry::refused("refused_apparmor", "confined as tracker-case", apparmor),
];

fn io_ports(case: &Case) -> Result<()> {
    // The POST code's, which nobody listens to.
    // SAFETY: takes integers.
    sys("ioperm", unsafe { libc::ioperm(0x80, 1, 1) }.into())?;
    case.ready()?;
    // SAFETY: allowed above; without the right this would be the end.
    unsafe {
        std::arch::asm!("out 0x80, al", in("al") 0_u8, options(nomem, nostack));
    }
    Ok(())
}

/// `struct user_desc`: the number of the entry, base, limit, flags (32-bit data).
fn segment(entry: u32) -> [u32; 4] {
    [entry, 0, 0xfffff, 0x51]
}

fn ldt(case: &Case) -> Result<()> {
    const WRITE: i32 = 1;
    let new = segment(0);
    // SAFETY: the kernel reads 16 bytes.
    sys("modify_ldt", unsafe {
        libc::syscall(
            libc::SYS_modify_ldt,
            WRITE,
            &raw const new,
            size_of_val(&new),
        )
    })?;
    case.ready()?;
    let mut table = [0_u64; 4];
    // SAFETY: the kernel fills the table at most.
    let read = sys("modify_ldt", unsafe {
        libc::syscall(
            libc::SYS_modify_ldt,
            0,
            table.as_mut_ptr(),
            size_of_val(&table),
        )
    })?;
    ensure!(read > 0 && table[0] != 0, "The table is empty");
    Ok(())
}

/// A system call of 32-bit programs, with one argument.
///
/// # Safety
/// As for the call.
unsafe fn call_32(number: i64, argument: u32) -> i64 {
    let result: i64;
    // SAFETY: the kernel changes the result and no other register but r8 to r11.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {argument}",
            "int 0x80",
            "xchg rbx, {argument}",
            argument = inout(reg) u64::from(argument) => _,
            inout("rax") number => result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result
}

/// Only programs of 32 bits have calls for it, which those of 64 bits can make.
fn tls_segment(case: &Case) -> Result<()> {
    const SET_THREAD_AREA: i64 = 243;
    const GET_THREAD_AREA: i64 = 244;
    let low = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel chooses an unused place.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, prot, low, -1, 0) };
    ensure!(at != libc::MAP_FAILED, "mmap of low memory");
    let described = at.cast::<[u32; 4]>();
    // SAFETY: mapped above, and ours alone; the kernel reads 16 bytes and writes the number.
    let set = unsafe {
        described.write(segment(u32::MAX));
        call_32(SET_THREAD_AREA, u32::try_from(at.addr())?)
    };
    ensure!(set == 0, "set_thread_area: {set}");
    case.ready()?;
    // SAFETY: as above.
    let (got, found) = unsafe {
        described.write(segment(described.read()[0]));
        let got = call_32(GET_THREAD_AREA, u32::try_from(at.addr())?);
        (got, described.read())
    };
    ensure!(got == 0 && found[2] == 0xfffff, "The segment is {found:x?}");
    Ok(())
}

fn user_dispatch(case: &Case) -> Result<()> {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    // Whatever the program calls from is allowed.
    let everywhere = 1_usize << 47;
    // SAFETY: takes integers; no selector.
    let set = |on: usize, offset: usize, length: usize| unsafe {
        libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, on, offset, length, 0)
    };
    sys("PR_SET_SYSCALL_USER_DISPATCH", set(1, 1, everywhere).into())?;
    case.ready()?;
    sys("PR_SET_SYSCALL_USER_DISPATCH", set(0, 0, 0).into()).map(drop)
}

/// In a child that does not read clocks.
fn no_tsc(case: &Case) -> Result<()> {
    let child = Child::start(case.dir(), "blind", |turn| {
        // SAFETY: takes integers.
        let set = unsafe { libc::prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV, 0, 0, 0) };
        sys("PR_SET_TSC", set.into())?;
        turn.wait();
        let mut mode = 0_i32;
        // SAFETY: the kernel writes the mode.
        let got = unsafe { libc::prctl(libc::PR_GET_TSC, &raw mut mode, 0, 0, 0) };
        sys("PR_GET_TSC", got.into())?;
        ensure!(mode == libc::PR_TSC_SIGSEGV, "It sees the counter");
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    child.finish()
}

fn landlock(case: &Case) -> Result<()> {
    const EXECUTE: u64 = 1;
    let handled = EXECUTE;
    // SAFETY: the kernel reads 8 bytes.
    let rules = sys("landlock_create_ruleset", unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, 8, 0)
    })?;
    // SAFETY: takes integers.
    sys("landlock_restrict_self", unsafe {
        libc::syscall(libc::SYS_landlock_restrict_self, rules, 0)
    })?;
    // SAFETY: ours, and not used any more.
    sys("close", unsafe { libc::syscall(libc::SYS_close, rules) })?;
    case.ready()?;
    let run = Command::new("/bin/true").status();
    ensure!(run.is_err(), "It can execute");
    Ok(())
}

fn holds_key(keyring: i32, case: &Case) -> Result<()> {
    const READ: i32 = 11;
    let key = add_key(c"tracker-case", keyring)?;
    case.ready()?;
    let mut payload = [0_u8; 4];
    // SAFETY: the kernel fills the payload at most.
    let read = sys("keyctl", unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            READ,
            key,
            payload.as_mut_ptr(),
            payload.len(),
        )
    })?;
    ensure!(read == 1 && payload[0] == b'x', "The key is {payload:?}");
    Ok(())
}

fn process_key(case: &Case) -> Result<()> {
    holds_key(PROCESS_KEYRING, case)
}

fn session_key(case: &Case) -> Result<()> {
    holds_key(SESSION_KEYRING, case)
}

/// With another one that mprotect(2) takes for memory which can only be executed.
fn pkey(case: &Case) -> Result<()> {
    // SAFETY: takes integers.
    let key = sys("pkey_alloc", unsafe {
        libc::syscall(libc::SYS_pkey_alloc, 0, 0)
    })?;
    let mut code = Pages::new(PAGE, MapFlags::MAP_PRIVATE)?;
    let at = code.write(0, PAGE).as_mut_ptr();
    // SAFETY: nobody reads it any more.
    let made = unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_EXEC) };
    sys("mprotect", made.into())?;
    case.ready()?;
    // SAFETY: as above.
    sys("pkey_free", unsafe {
        libc::syscall(libc::SYS_pkey_free, key)
    })
    .map(drop)
}

fn shared_policy(case: &Case) -> Result<()> {
    const MPOL_BIND: i32 = 2;
    let nodes: u64 = 1;
    let mut pages = Pages::new(4 * PAGE, MapFlags::MAP_SHARED)?;
    let at = pages.write(0, PAGE).as_mut_ptr();
    // SAFETY: the kernel reads one word of nodes.
    sys("mbind", unsafe {
        libc::syscall(
            libc::SYS_mbind,
            at,
            4 * PAGE,
            MPOL_BIND,
            &raw const nodes,
            65,
            0,
        )
    })?;
    case.ready()?;
    pages.write(0, PAGE).fill(3);
    Ok(())
}

fn apparmor(case: &Case) -> Result<()> {
    const LABEL: &str = "/proc/self/attr/current";
    let profile = case.path("profile");
    fs::write(
        &profile,
        "profile tracker-case flags=(complain) { /usr/** r, }\n",
    )?;
    let loaded = Command::new("apparmor_parser")
        .args(["--replace", "--skip-cache"])
        .arg(&profile)
        .output()
        .context("apparmor_parser")?;
    ensure!(loaded.status.success(), "apparmor_parser: {loaded:?}");
    fs::write(LABEL, "changeprofile tracker-case").context(LABEL)?;
    case.ready()?;
    let label = fs::read_to_string(LABEL)?;
    ensure!(label.starts_with("tracker-case"), "It is {label}");
    Ok(())
}
