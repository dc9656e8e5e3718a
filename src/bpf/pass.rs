//! One run of a BPF iterator program, over all tasks or over those of one process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys;

/// The kernel hands out at most its 32 KiB buffer at a time.
const CHUNK: usize = 32 << 10;

/// A buffer that only ever grows, so that later passes do not allocate.
#[derive(Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    filled: usize,
}

impl Buffer {
    pub(super) fn clear(&mut self) {
        self.filled = 0;
    }

    pub(super) fn room(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn make_room(&mut self, bytes: usize) {
        if self.bytes.len() < bytes {
            // Not zeroes, which would be mapped only when they are written to.
            self.bytes.resize(bytes, 1);
        }
    }

    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    /// Room for at least one read.
    fn spare(&mut self) -> &mut [u8] {
        if self.bytes.len() - self.filled < CHUNK {
            let grown = self.bytes.len().max(CHUNK) * 2;
            self.bytes.resize(grown, 0);
        }
        &mut self.bytes[self.filled..]
    }
}

/// What a link is attached to: all tasks, or the threads of one process.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    System,
    Process(u32),
}

/// Attaches an iterator program; `BPF_LINK_CREATE` with `bpf_iter_link_info.task` of Linux 6.1.
pub(super) fn link(program: BorrowedFd<'_>, target: Target) -> io::Result<OwnedFd> {
    let mut info = libbpf_sys::bpf_iter_link_info::default();
    let mut options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    if let Target::Process(pid) = target {
        info.task = libbpf_sys::bpf_iter_link_info__bindgen_ty_3 {
            pid,
            ..Default::default()
        };
        options.iter_info = &raw mut info;
        options.iter_info_len = u32::try_from(size_of_val(&info)).unwrap_or(0);
    }
    // SAFETY: the options and what they point at outlive the call.
    let fd = unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            0,
            libbpf_sys::BPF_TRACE_ITER,
            &raw const options,
        )
    };
    own(fd)
}

/// Runs the iterator of a link from start to end, appending to `buffer`.
pub(super) fn run(link: BorrowedFd<'_>, buffer: &mut Buffer) -> io::Result<()> {
    // SAFETY: the descriptor is open; the call takes nothing else.
    let fd = unsafe { libbpf_sys::bpf_iter_create(link.as_raw_fd()) };
    let mut iter = File::from(own(fd)?);
    loop {
        match iter.read(buffer.spare()) {
            Ok(0) => return Ok(()),
            Ok(count) => buffer.filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // the kernel gave up after a million objects that wrote nothing: go on from there
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Takes over what libbpf returned: a new descriptor, or an error number negated.
pub(super) fn own(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
