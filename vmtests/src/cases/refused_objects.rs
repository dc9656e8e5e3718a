//! Objects of kinds that are not carried at all; see `refused`.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::waitpid;

use super::probe::{owned, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::refused("refused_dnotify", "watched by F_NOTIFY", dnotify),
    Entry::refused("refused_perf_event", "perf event", perf_event),
    Entry::refused("refused_bpf_map", "BPF object", bpf_map),
    Entry::refused("refused_namespace", "IPC namespace", namespace),
    Entry::refused("refused_clone_vm", "address space shared", clone_vm),
];

/// A directory that is watched by a signal, beside one that is open only.
fn dnotify(case: &Case) -> Result<()> {
    let _other = File::open(case.dir())?;
    let watched = File::open(case.dir())?;
    let (mut mask, wanted) = (SigSet::empty(), Signal::SIGIO);
    mask.add(wanted);
    mask.thread_block()?;
    // Of include/uapi/linux/fcntl.h.
    const DN_CREATE: libc::c_ulong = 0x4;
    const DN_MULTISHOT: libc::c_ulong = 0x8000_0000;
    let fd = watched.as_raw_fd();
    // SAFETY: takes integers.
    let set = unsafe { libc::fcntl(fd, libc::F_NOTIFY, DN_CREATE | DN_MULTISHOT) };
    sys("F_NOTIFY", set.into())?;
    case.ready()?;
    let _made = File::create(case.path("made"))?;
    ensure!(mask.wait()? == wanted, "Another signal");
    Ok(())
}

fn perf_event(case: &Case) -> Result<()> {
    // struct perf_event_attr, first version: type PERF_TYPE_SOFTWARE, size 64, config
    // PERF_COUNT_SW_PAGE_FAULTS.
    let attributes: [u64; 8] = [1 | 64 << 32, 2, 0, 0, 0, 0, 0, 0];
    // SAFETY: the kernel reads 64 bytes.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) };
    let event = owned("perf_event_open", fd)?;
    case.ready()?;
    let mut count = [0; 8];
    let mut file = File::from(event);
    let memory = vec![1_u8; 1 << 20];
    file.read_exact(&mut count)?;
    ensure!(
        u64::from_ne_bytes(count) > 0 && memory[77] == 1,
        "No page faults are counted"
    );
    Ok(())
}

fn bpf_map(case: &Case) -> Result<()> {
    const BPF_MAP_CREATE: i32 = 0;
    const BPF_MAP_UPDATE_ELEM: i32 = 2;
    const ARRAY: u32 = 2;
    // union bpf_attr: type and key size, value size and entries.
    let attributes: [u32; 32] = {
        let mut words = [0; 32];
        words[..4].copy_from_slice(&[ARRAY, 4, 8, 1]);
        words
    };
    let len = size_of_val(&attributes);
    // SAFETY: the kernel reads the attributes.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, attributes.as_ptr(), len) };
    let map = owned("bpf(BPF_MAP_CREATE)", fd)?;
    case.ready()?;
    let (key, value) = (0_u32, 5_u64);
    // union bpf_attr: map, key, value.
    let mut attributes = [0_u64; 16];
    attributes[0] = u64::from(map.as_raw_fd().cast_unsigned());
    attributes[1] = (&raw const key) as u64;
    attributes[2] = (&raw const value) as u64;
    // SAFETY: the kernel reads the attributes, the key and the value.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_UPDATE_ELEM, attributes.as_ptr(), len) };
    sys("bpf(BPF_MAP_UPDATE_ELEM)", done).map(|_| ())
}

fn namespace(case: &Case) -> Result<()> {
    let link = || std::fs::read_link("/proc/self/ns/ipc");
    unshare(CloneFlags::CLONE_NEWIPC)?;
    let own = link()?;
    case.ready()?;
    ensure!(link()? == own, "In another namespace");
    Ok(())
}

extern "C" fn sleep_for_ever(_: *mut libc::c_void) -> i32 {
    loop {
        // SAFETY: no memory is touched.
        unsafe { libc::syscall(libc::SYS_pause) };
    }
}

/// A child in its parent's address space.
fn clone_vm(case: &Case) -> Result<()> {
    let mut stack = vec![0_u64; 8192];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: a stack of its own, which outlives the child; it makes one system call only.
    let child = unsafe { libc::clone(sleep_for_ever, top.cast(), flags, std::ptr::null_mut()) };
    sys("clone", child.into())?;
    case.ready()?;
    let child = nix::unistd::Pid::from_raw(child);
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    waitpid(child, None).context("Wait for the child")?;
    ensure!(stack.len() == 8192, "The stack is gone");
    Ok(())
}
