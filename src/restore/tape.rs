//! The syscall tape: machine code that executes an array of system calls and traps.
//!
//! The code keeps its state in two registers, r15 (next entry) and r14 (entries left), and
//! uses no stack. An entry is eight words: number, six arguments, result.

use crate::model::frozen::Registers;
use crate::sys::area::Area;
use nix::errno::Errno;
use nix::libc;
use std::fmt;

/// Loads an entry, executes it, stores the result, goes on to the next, traps at the end.
pub const CODE: [u8; 43] = [
    0x49, 0x8b, 0x07, // mov rax, [r15]
    0x49, 0x8b, 0x7f, 0x08, // mov rdi, [r15 + 8]
    0x49, 0x8b, 0x77, 0x10, // mov rsi, [r15 + 16]
    0x49, 0x8b, 0x57, 0x18, // mov rdx, [r15 + 24]
    0x4d, 0x8b, 0x57, 0x20, // mov r10, [r15 + 32]
    0x4d, 0x8b, 0x47, 0x28, // mov r8, [r15 + 40]
    0x4d, 0x8b, 0x4f, 0x30, // mov r9, [r15 + 48]
    0x0f, 0x05, // syscall
    0x49, 0x89, 0x47, 0x38, // mov [r15 + 56], rax
    0x49, 0x83, 0xc7, 0x40, // add r15, 64
    0x49, 0xff, 0xce, // dec r14
    0x75, 0xd6, // jnz to the start
    0xcc, // int3
];

/// Bytes of one entry.
pub const ENTRY: usize = 64;

/// What a call must return for the restore to be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Exactly this.
    Is(i64),
    /// No error.
    Ok,
    /// Whatever it likes.
    Anything,
}

/// One system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Number.
    pub nr: i64,
    /// Arguments, all six set: stale registers are arguments too.
    pub args: [u64; 6],
    /// What it must return.
    pub expect: Expect,
}

/// A call that did not return what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The call.
    pub call: Call,
    /// What it returned.
    pub result: i64,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = name(self.call.nr);
        write!(f, "{name}(")?;
        let used = self.call.args.iter().rposition(|a| *a != 0).unwrap_or(0);
        for (i, arg) in self.call.args[..=used].iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{arg:#x}")?;
        }
        match i32::try_from(-self.result) {
            Ok(errno @ 1..=4095) => write!(f, "): {}", Errno::from_raw(errno)),
            _ => write!(f, ") returned {:#x}", self.result),
        }
    }
}

/// A list of calls under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// In order of execution.
    pub calls: Vec<Call>,
}

impl Script {
    /// Adds a call with at most six arguments that must return 0.
    pub fn zero(&mut self, nr: i64, args: &[u64]) {
        self.add(nr, args, Expect::Is(0));
    }

    /// Adds a call with at most six arguments.
    ///
    /// # Panics
    /// There are more.
    pub fn add(&mut self, nr: i64, args: &[u64], expect: Expect) {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        self.calls.push(Call {
            nr,
            args: all,
            expect,
        });
    }

    /// The entries as the code reads them.
    #[must_use]
    pub fn encode(calls: &[Call]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(calls.len() * ENTRY);
        for call in calls {
            bytes.extend(call.nr.to_le_bytes());
            for arg in call.args {
                bytes.extend(arg.to_le_bytes());
            }
            bytes.extend([0; 8]);
        }
        bytes
    }

    /// The results in executed entries.
    #[must_use]
    pub fn results(bytes: &[u8]) -> Vec<i64> {
        let words = bytes
            .chunks_exact(ENTRY)
            .filter_map(|e| e.last_chunk::<8>());
        words.map(|word| i64::from_le_bytes(*word)).collect()
    }

    /// The first call that did not return what it must.
    #[must_use]
    pub fn refused(calls: &[Call], results: &[i64]) -> Option<Refusal> {
        let mut pairs = calls.iter().zip(results);
        let (call, result) = pairs.find(|(call, result)| match call.expect {
            Expect::Is(value) => **result != value,
            Expect::Ok => (-4095..0).contains(*result),
            Expect::Anything => false,
        })?;
        Some(Refusal {
            call: *call,
            result: *result,
        })
    }
}

/// Where things lie in the area that a process and its supervisor share.
///
/// One page of code and control words, then entries, then data for the calls to point to.
#[derive(Debug)]
pub struct Tape {
    area: Area,
    data_used: usize,
}

impl Tape {
    const MESSAGE: usize = 1024;
    const MESSAGE_MAX: usize = 3072;
    const GO: usize = 512;
    const ENTRIES: usize = 4096;
    const DATA: usize = 512 * 1024;
    /// Length of an area.
    pub const LEN: usize = 1024 * 1024;
    /// Entries that fit.
    pub const CAPACITY: usize = (Self::DATA - Self::ENTRIES) / ENTRY;

    /// Makes a tape at `addr`.
    ///
    /// # Errors
    /// The address is taken, or the system forbids executable memory.
    pub fn new(addr: u64) -> Result<Self, Errno> {
        let area = Area::map(addr, Self::LEN)?;
        area.write(0, &CODE);
        Ok(Self { area, data_used: 0 })
    }

    /// First address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.area.addr()
    }

    /// Sleeps until [`Self::release`].
    pub fn wait_released(&self) {
        self.area.wait(Self::GO);
    }

    /// Lets the process that waits go on.
    pub fn release(&self) {
        self.area.wake(Self::GO);
    }

    /// Leaves a message for the supervisor.
    pub fn leave_message(&self, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.truncate(Self::MESSAGE_MAX - 2);
        let len = u16::try_from(bytes.len()).unwrap_or(0);
        self.area.write(Self::MESSAGE, &len.to_le_bytes());
        self.area.write(Self::MESSAGE + 2, &bytes);
    }

    /// The message left, or "".
    #[must_use]
    pub fn message(&self) -> String {
        let mut len = [0; 2];
        self.area.read(Self::MESSAGE, &mut len);
        let mut bytes = vec![0; usize::from(u16::from_le_bytes(len)).min(Self::MESSAGE_MAX - 2)];
        self.area.read(Self::MESSAGE + 2, &mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Forgets the data of earlier scripts.
    pub fn clear_data(&mut self) {
        self.data_used = 0;
    }

    /// How much data there is, for [`Self::rewind`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.data_used
    }

    /// Forgets the data placed since [`Self::mark`].
    pub fn rewind(&mut self, mark: usize) {
        self.data_used = mark;
    }

    /// Places bytes where a call can point to them; `None` when there is no room left.
    pub fn data(&mut self, bytes: &[u8]) -> Option<u64> {
        let offset = Self::DATA + self.data_used;
        if offset + bytes.len() > Self::LEN {
            return None;
        }
        self.area.write(offset, bytes);
        self.data_used = (self.data_used + bytes.len()).next_multiple_of(16);
        Some(self.area.addr() + offset as u64)
    }

    /// Reads data back.
    pub fn read_data(&self, addr: u64, bytes: &mut [u8]) {
        let offset = usize::try_from(addr - self.area.addr()).unwrap_or(usize::MAX);
        self.area.read(offset, bytes);
    }

    /// Writes entries from slot `first` on.
    pub fn load(&self, first: usize, calls: &[Call]) {
        let offset = Self::ENTRIES + first * ENTRY;
        self.area.write(offset, &Script::encode(calls));
    }

    /// Results of `count` entries from slot `first` on.
    #[must_use]
    pub fn results(&self, first: usize, count: usize) -> Vec<i64> {
        let mut bytes = vec![0; count * ENTRY];
        self.area.read(Self::ENTRIES + first * ENTRY, &mut bytes);
        Script::results(&bytes)
    }

    /// Registers that execute `count` entries from slot `first` on.
    #[must_use]
    pub fn registers(&self, template: &Registers, first: usize, count: usize) -> Registers {
        Registers {
            r15: self.area.addr() + (Self::ENTRIES + first * ENTRY) as u64,
            r14: count as u64,
            rip: self.area.addr(),
            rsp: self.area.addr() + Self::LEN as u64,
            // Otherwise the kernel may take the old call for one to restart.
            orig_rax: u64::MAX,
            eflags: 0x202,
            ..*template
        }
    }
}

fn name(nr: i64) -> String {
    let name = match nr {
        libc::SYS_mmap => "mmap",
        libc::SYS_munmap => "munmap",
        libc::SYS_mremap => "mremap",
        libc::SYS_mprotect => "mprotect",
        libc::SYS_madvise => "madvise",
        libc::SYS_mlock => "mlock",
        libc::SYS_mlockall => "mlockall",
        libc::SYS_pread64 => "pread64",
        libc::SYS_close => "close",
        libc::SYS_fcntl => "fcntl",
        libc::SYS_prctl => "prctl",
        libc::SYS_arch_prctl => "arch_prctl",
        libc::SYS_rseq => "rseq",
        libc::SYS_clone3 => "clone3",
        libc::SYS_rt_sigaction => "rt_sigaction",
        libc::SYS_rt_sigqueueinfo => "rt_sigqueueinfo",
        libc::SYS_rt_tgsigqueueinfo => "rt_tgsigqueueinfo",
        libc::SYS_sigaltstack => "sigaltstack",
        libc::SYS_set_robust_list => "set_robust_list",
        libc::SYS_set_tid_address => "set_tid_address",
        libc::SYS_setpgid => "setpgid",
        libc::SYS_setitimer => "setitimer",
        libc::SYS_timer_create => "timer_create",
        libc::SYS_timer_settime => "timer_settime",
        libc::SYS_timer_delete => "timer_delete",
        libc::SYS_msgsnd => "msgsnd",
        libc::SYS_semop => "semop",
        libc::SYS_semctl => "semctl",
        libc::SYS_msgrcv => "msgrcv",
        libc::SYS_io_setup => "io_setup",
        libc::SYS_io_submit => "io_submit",
        libc::SYS_io_getevents => "io_getevents",
        libc::SYS_io_destroy => "io_destroy",
        libc::SYS_setgroups => "setgroups",
        libc::SYS_setresuid => "setresuid",
        libc::SYS_setresgid => "setresgid",
        libc::SYS_capset => "capset",
        libc::SYS_sched_setaffinity => "sched_setaffinity",
        libc::SYS_sched_setattr => "sched_setattr",
        other => return format!("system call {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_eight_words() {
        let mut script = Script::default();
        script.zero(libc::SYS_munmap, &[0x1000, 0x2000]);
        let bytes = Script::encode(&script.calls);
        assert_eq!(bytes.len(), ENTRY);
        assert_eq!(bytes[0], 11);
        assert_eq!(bytes[8..16], 0x1000_u64.to_le_bytes());
        assert_eq!(bytes[16..24], 0x2000_u64.to_le_bytes());
        assert_eq!(bytes[24..], [0; 40]);
    }

    #[test]
    fn results_are_the_last_word() {
        let mut bytes = vec![0; 2 * ENTRY];
        bytes[56..64].copy_from_slice(&(-12_i64).to_le_bytes());
        bytes[120..128].copy_from_slice(&7_i64.to_le_bytes());
        assert_eq!(Script::results(&bytes), [-12, 7]);
    }

    #[test]
    fn a_refused_call_is_told_with_its_arguments() {
        let mut script = Script::default();
        script.add(libc::SYS_getpid, &[], Expect::Anything);
        script.zero(libc::SYS_munmap, &[0x1000, 0x2000]);
        let refusal = Script::refused(&script.calls, &[-1, -22]).unwrap();
        assert_eq!(
            refusal.to_string(),
            "munmap(0x1000, 0x2000): EINVAL: Invalid argument"
        );
        assert_eq!(Script::refused(&script.calls, &[-1, 0]), None);
    }

    #[test]
    fn the_loop_jumps_to_its_start() {
        let jump = CODE.len() - 3;
        assert_eq!(CODE[jump], 0x75);
        let target = jump.wrapping_add_signed(2 + isize::from(CODE[jump + 1].cast_signed()));
        assert_eq!(target, 0);
    }

    #[test]
    fn data_and_messages_stay_apart() {
        let mut tape = Tape::new(0x2300_0000_0000).unwrap();
        tape.leave_message("cannot chdir");
        let addr = tape.data(b"0123").unwrap();
        assert!(tape.data(&[0; Tape::LEN]).is_none());
        let mut back = [0; 4];
        tape.read_data(addr, &mut back);
        assert_eq!(&back, b"0123");
        assert_eq!(tape.message(), "cannot chdir");
    }
}
