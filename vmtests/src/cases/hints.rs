//! What the kernel was told of how files will be used: posix_fadvise(2), the life of what is
//! written, how an epoll instance polls devices.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::memory::PAGE;
use super::probe::{pattern, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("file_advice", advice),
    Entry::carried("file_write_life", write_life),
    Entry::carried("epoll_busy_poll", busy_poll),
];

/// Bytes of the file that is read.
const SIZE: usize = 4 << 20;

fn advise(file: &File, advice: PosixFadviseAdvice) -> Result<()> {
    posix_fadvise(file, 0, 0, advice).with_context(|| format!("posix_fadvise {advice:?}"))
}

/// Pages of a file that are in the page cache, from this one on.
fn resident(file: &File, from: usize) -> Result<usize> {
    let length = SIZE.try_into()?;
    // SAFETY: a new mapping where nothing is, which is not touched.
    let memory = unsafe {
        mmap(
            None,
            length,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            file,
            0,
        )
    }?;
    let mut pages = vec![0_u8; SIZE / PAGE];
    // SAFETY: the kernel writes one byte for each page.
    let asked = unsafe { libc::mincore(memory.as_ptr(), SIZE, pages.as_mut_ptr()) };
    let asked = Errno::result(asked).context("mincore");
    // SAFETY: nobody else knows it.
    unsafe { munmap(memory, SIZE) }?;
    asked?;
    Ok(pages[from..].iter().filter(|page| **page & 1 != 0).count())
}

/// A file that is read at random, one that is read in a row, and one of which nothing was said:
/// what the kernel reads ahead tells them apart.
fn advice(case: &Case) -> Result<()> {
    let path = case.path("read");
    std::fs::write(&path, pattern(41, SIZE))?;
    let (usual, random, row) = (File::open(&path)?, File::open(&path)?, File::open(&path)?);
    usual.sync_all()?;
    advise(&random, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    advise(&random, PosixFadviseAdvice::POSIX_FADV_NOREUSE)?;
    advise(&row, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL)?;
    case.ready()?;
    let forget = || advise(&usual, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let ahead = |file: &File, pages: std::ops::Range<usize>| -> Result<usize> {
        forget()?;
        ensure!(resident(&usual, 0)? == 0, "The file cannot be forgotten");
        let mut page = [0; PAGE];
        for number in pages.clone() {
            file.read_exact_at(&mut page, (number * PAGE) as u64)?;
        }
        // What is still on its way does not count.
        std::thread::sleep(Duration::from_millis(500));
        resident(&usual, pages.end)
    };
    // The first page is where reading in a row begins.
    let (one, many) = (0..1, 0..256);
    let found = ahead(&random, one.clone())?;
    ensure!(
        found == 0,
        "{found} pages are read beside the one asked for"
    );
    let found = ahead(&usual, one)?;
    ensure!(found > 0, "Nothing is read ahead as usual");
    let (twice, once) = (ahead(&row, many.clone())?, ahead(&usual, many)?);
    ensure!(twice > once, "{twice} pages are read ahead, usually {once}");
    Ok(())
}

/// What `F_GET_RW_HINT` says.
fn life(file: &impl AsFd) -> Result<u64> {
    const F_GET_RW_HINT: i32 = 1035;
    let mut life = 0_u64;
    // SAFETY: the kernel writes one u64.
    let got = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), F_GET_RW_HINT, &raw mut life) };
    sys("F_GET_RW_HINT", got.into())?;
    Ok(life)
}

fn set_life(file: &impl AsFd, life: u64) -> Result<()> {
    const F_SET_RW_HINT: i32 = 1036;
    // SAFETY: the kernel reads one u64.
    let set = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), F_SET_RW_HINT, &raw const life) };
    sys("F_SET_RW_HINT", set.into()).map(drop)
}

/// Of files with a name and without, of a memfd, and of one of which nothing was said.
fn write_life(case: &Case) -> Result<()> {
    const SHORT: u64 = 2;
    const EXTREME: u64 = 5;
    let named = File::create(case.path("named"))?;
    let reader = File::open(case.path("named"))?;
    let deleted = File::create(case.path("deleted"))?;
    std::fs::remove_file(case.path("deleted"))?;
    let memory = memfd_create(c"life", MFdFlags::MFD_CLOEXEC)?;
    let plain = File::create(case.path("plain"))?;
    set_life(&named, SHORT)?;
    set_life(&deleted, EXTREME)?;
    set_life(&memory, SHORT)?;
    case.ready()?;
    let found = [
        life(&named)?,
        life(&reader)?,
        life(&deleted)?,
        life(&memory)?,
    ];
    ensure!(
        found == [SHORT, SHORT, EXTREME, SHORT],
        "They are {found:?}"
    );
    ensure!(life(&plain)? == 0, "The plain one has a hint");
    Ok(())
}

/// The parameters of one epoll instance, where this kernel has them; the other has none.
fn busy_poll(case: &Case) -> Result<()> {
    fn asked(epoll: &Epoll) -> nix::Result<(u32, u16, u8)> {
        // SAFETY: plain integers, for which zero is a value.
        let mut params: libc::epoll_params = unsafe { std::mem::zeroed() };
        let fd = epoll.0.as_raw_fd();
        // SAFETY: the kernel writes one epoll_params.
        Errno::result(unsafe { libc::ioctl(fd, libc::EPIOCGPARAMS, &raw mut params) })?;
        Ok((
            params.busy_poll_usecs,
            params.busy_poll_budget,
            params.prefer_busy_poll,
        ))
    }
    let epolls = [(); 2].map(|()| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC));
    let [own, plain] = epolls;
    let (own, plain) = (own?, plain?);
    let wanted = libc::epoll_params {
        busy_poll_usecs: 70,
        busy_poll_budget: 16,
        prefer_busy_poll: 1,
        __pad: 0,
    };
    // SAFETY: the kernel reads one epoll_params.
    let set = unsafe { libc::ioctl(own.0.as_raw_fd(), libc::EPIOCSPARAMS, &raw const wanted) };
    let known = match Errno::result(set) {
        Ok(_) => true,
        Err(Errno::ENOTTY | Errno::EINVAL) => false,
        Err(errno) => return Err(errno).context("EPIOCSPARAMS"),
    };
    case.ready()?;
    if known {
        ensure!(asked(&own)? == (70, 16, 1), "It has {:?}", asked(&own)?);
        ensure!(
            asked(&plain)? == (0, 0, 0),
            "The other has {:?}",
            asked(&plain)?
        );
    }
    Ok(())
}
