//! Pseudo-terminals: pairs with their old numbers, and what was queued in them.
//!
//! What was typed is typed again (`TIOCSTI`), with settings under which the line discipline
//! makes the same of it, whatever the byte. No process of the application exists yet, so
//! nobody sees these settings, or a signal.

use super::error::{FilesError, call, missing_part};
use crate::model::frozen::{Application, FileKind, OpenFile, PtyInput, PtyState, Termios};
use crate::model::ids::OfdId;
use crate::sys::tty;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::{Mode, fchmodat, major, minor, stat};
use nix::unistd::{Gid, Uid, chown, write};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Ends of one pseudo-terminal.
struct Pair<'a> {
    id: u64,
    state: Option<&'a PtyState>,
    master: Option<(OfdId, &'a OpenFile, PathBuf)>,
    slaves: Vec<(OfdId, &'a OpenFile)>,
}

/// What was opened.
#[derive(Default)]
pub struct Opened {
    /// Every end.
    pub ofds: BTreeMap<OfdId, OwnedFd>,
    /// A slave of our own of each terminal that has been open, by the terminal's id: to be
    /// held until the application stands.
    pub slaves: BTreeMap<u64, OwnedFd>,
}

/// Makes every pseudo-terminal of the application.
///
/// # Errors
/// A number is in use, or the kernel refuses a step.
pub fn open_all(app: &Application) -> Result<Opened, FilesError> {
    let mut opened = Opened::default();
    let mut pairs: Vec<_> = Vec::new();
    for pair in pairs_of(app).into_values() {
        let state = pair.state;
        let state = state.ok_or_else(|| missing_part("pseudo-terminal", "state"))?;
        pairs.push((state, pair));
    }
    // Numbers are given out from the lowest free one on (devpts_new_index()).
    pairs.sort_by_key(|(state, _)| state.index);
    let mut fillers = Vec::new();
    for (state, pair) in &pairs {
        make(state, pair, &mut fillers, &mut opened)?;
    }
    Ok(opened)
}

fn pairs_of(app: &Application) -> BTreeMap<u64, Pair<'_>> {
    let mut pairs = BTreeMap::new();
    for (&ofd, file) in &app.ofds {
        let FileKind::Pty {
            id,
            master,
            at,
            state,
        } = &file.kind
        else {
            continue;
        };
        let pair = pairs.entry(*id).or_insert(Pair {
            id: *id,
            state: None,
            master: None,
            slaves: Vec::new(),
        });
        pair.state = pair.state.or(state.as_deref());
        match master {
            true => pair.master = Some((ofd, file, super::regular::here(at))),
            false => pair.slaves.push((ofd, file)),
        }
    }
    pairs
}

/// Flags for an end; `O_ASYNC` comes with `F_SETFL`, which names an owner for the signal.
fn flags_of(file: &OpenFile) -> OFlag {
    let flags = OFlag::from_bits_retain(file.flags.cast_signed());
    flags.difference(OFlag::O_ASYNC) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC
}

fn make(
    state: &PtyState,
    pair: &Pair<'_>,
    fillers: &mut Vec<OwnedFd>,
    opened: &mut Opened,
) -> Result<(), FilesError> {
    let pty = Pty {
        object: format!("pseudo-terminal /dev/pts/{}", state.index),
        state,
    };
    let (path, flags) = match &pair.master {
        Some((_, file, path)) => (path.as_path(), flags_of(file)),
        None => (
            Path::new("/dev/ptmx"),
            OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
        ),
    };
    let master = pty.open_master(path, flags, fillers)?;
    pty.set_owner()?;
    tty::set_lock(&master, false).map_err(pty.failed("ioctl(TIOCSPTLCK)"))?;
    let open_slave = |flags: OFlag| {
        tty::open_slave(&master, flags.bits()).map_err(pty.failed("ioctl(TIOCGPTPEER)"))
    };
    for (ofd, file) in &pair.slaves {
        opened.ofds.insert(*ofd, open_slave(flags_of(file))?);
    }
    if state.hung_up {
        // The last master that is closed hangs up all slaves (pty_close()).
        drop(master);
        return Ok(());
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let slave = match state.slave_opened {
        true => Some(open_slave(flags)?),
        false => None,
    };
    tty::set_winsize(&master, state.winsize).map_err(pty.failed("ioctl(TIOCSWINSZ)"))?;
    if let Some(slave) = &slave {
        pty.fill(master.as_fd(), slave.as_fd())?;
    }
    pty.settle(master.as_fd(), slave.as_ref())?;
    opened.slaves.extend(slave.map(|slave| (pair.id, slave)));
    if let Some((ofd, ..)) = pair.master {
        opened.ofds.insert(ofd, master);
    }
    Ok(())
}

struct Pty<'a> {
    object: String,
    state: &'a PtyState,
}

/// `VEOF` and `VLNEXT` while lines are typed again: Ctrl-D and Ctrl-V.
const EOF: u8 = 4;
const LNEXT: u8 = 22;

impl Pty<'_> {
    fn failed(&self, name: &'static str) -> impl FnOnce(Errno) -> FilesError + use<> {
        call(self.object.clone(), name)
    }

    /// Opens masters until one has the number; those before it are held until all are made.
    fn open_master(
        &self,
        path: &Path,
        flags: OFlag,
        fillers: &mut Vec<OwnedFd>,
    ) -> Result<OwnedFd, FilesError> {
        loop {
            // Not to sleep when it is written to; F_SETFL says later what it is to be.
            let fd = open(path, flags | OFlag::O_NONBLOCK, Mode::empty())
                .map_err(self.failed("open of its master"))?;
            let number = tty::number(&fd).map_err(self.failed("ioctl(TIOCGPTN)"))?;
            if number == self.state.index {
                return Ok(fd);
            }
            if number > self.state.index {
                // Given out already, and not by us.
                return Err(self.failed("open of its master")(Errno::EEXIST));
            }
            fillers.push(fd);
        }
    }

    fn set_owner(&self) -> Result<(), FilesError> {
        let state = self.state;
        let path = PathBuf::from(format!("/dev/pts/{}", state.index));
        let found = stat(&path).map_err(self.failed("stat"))?;
        let is_ours = (major(found.st_rdev), minor(found.st_rdev)) == (136, state.index.into());
        if !is_ours {
            return Err(FilesError::Changed {
                path: path.display().to_string(),
                reason: "it is not the slave of the master that was opened".to_owned(),
            });
        }
        let (uid, gid) = (Uid::from_raw(state.uid), Gid::from_raw(state.gid));
        chown(&path, Some(uid), Some(gid)).map_err(self.failed("chown"))?;
        let mode = Mode::from_bits_truncate(state.mode);
        let flag = nix::sys::stat::FchmodatFlags::FollowSymlink;
        fchmodat(nix::fcntl::AT_FDCWD, &path, mode, flag).map_err(self.failed("fchmodat"))
    }

    /// The queues, and the columns that echoes have left.
    fn fill(&self, master: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<(), FilesError> {
        let (state, input) = (self.state, &self.state.input);
        let canonical = state.termios.lflag & libc::ICANON != 0 && !self.external();
        // Turning ICANON or EXTPROC on or off takes bytes for a line that were none
        // (n_tty_set_termios()): they are what they are to be from here on.
        let mut plain = Termios {
            cflag: state.termios.cflag,
            lflag: state.termios.lflag & (libc::ICANON | libc::EXTPROC),
            ispeed: state.termios.ispeed,
            ospeed: state.termios.ospeed,
            ..Termios::default()
        };
        if canonical {
            self.type_lines(slave, &mut plain)?;
            let partial = input.bytes.get(self.complete()..).unwrap_or_default();
            self.move_to(master, slave, &mut plain, state.canon_column, 0)?;
            // The column a line begins in is noted by the first echo.
            plain.lflag |= state.termios.lflag & libc::ECHO;
            self.set(slave, &plain)?;
            self.type_literally(slave, partial)?;
            plain.lflag &= !libc::ECHO;
            self.discard(master)?;
        } else {
            self.set(slave, &plain)?;
            for byte in input.bytes.iter() {
                self.type_byte(slave, *byte)?;
            }
        }
        // An echo takes eight columns at most, that of a tab.
        let partial = input.bytes.len() - self.complete();
        let reached = state.canon_column % 8 + 1024 + 8 * u32::try_from(partial).unwrap_or(0);
        self.move_to(master, slave, &mut plain, state.column, reached)?;
        plain.oflag = 0;
        self.set(slave, &plain)?;
        self.write(slave, &state.output)
    }

    /// How many bytes are complete lines.
    fn complete(&self) -> usize {
        let input = &self.state.input;
        input.bytes.len().min(input.complete as usize)
    }

    fn external(&self) -> bool {
        self.state.termios.lflag & libc::EXTPROC != 0
    }

    /// The complete lines of canonical mode.
    fn type_lines(&self, slave: BorrowedFd<'_>, plain: &mut Termios) -> Result<(), FilesError> {
        let PtyInput {
            bytes,
            line_ends,
            pushed,
            ..
        } = &self.state.input;
        let mut lines = &bytes[..self.complete()];
        let mut start = 0;
        if *pushed {
            // What was there when canonical mode came on counts as one line.
            let first = line_ends
                .first()
                .map_or(lines.len(), |end| *end as usize + 1);
            let first = first.min(lines.len());
            plain.lflag = 0;
            self.set(slave, plain)?;
            for byte in &lines[..first] {
                self.type_byte(slave, *byte)?;
            }
            lines = &lines[first..];
            start = first;
        }
        plain.lflag = libc::ICANON | libc::IEXTEN;
        plain.cc[libc::VEOF] = EOF;
        plain.cc[libc::VLNEXT] = LNEXT;
        self.set(slave, plain)?;
        for (at, byte) in (start..).zip(lines) {
            if !line_ends.iter().any(|end| *end as usize == at) {
                self.type_literally(slave, &[*byte])?;
                continue;
            }
            match *byte {
                b'\n' => self.type_byte(slave, b'\n')?,
                // An end of file is kept as a zero.
                0 => self.type_byte(slave, EOF)?,
                // VEOL or VEOL2, as they were then.
                byte => {
                    plain.cc[libc::VEOL] = byte;
                    self.set(slave, plain)?;
                    self.type_byte(slave, byte)?;
                    plain.cc[libc::VEOL] = 0;
                    self.set(slave, plain)?;
                }
            }
        }
        Ok(())
    }

    /// Bytes that end no line, whatever they are.
    fn type_literally(&self, slave: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), FilesError> {
        for byte in bytes {
            if [b'\n', EOF, LNEXT].contains(byte) {
                self.type_byte(slave, LNEXT)?;
            }
            self.type_byte(slave, *byte)?;
        }
        Ok(())
    }

    fn type_byte(&self, slave: BorrowedFd<'_>, byte: u8) -> Result<(), FilesError> {
        tty::type_byte(slave, byte).map_err(self.failed("ioctl(TIOCSTI)"))
    }

    fn set(&self, fd: BorrowedFd<'_>, termios: &Termios) -> Result<(), FilesError> {
        tty::set_termios(fd, termios).map_err(self.failed("ioctl(TCSETS2)"))
    }

    fn discard(&self, master: BorrowedFd<'_>) -> Result<(), FilesError> {
        tty::flush_input(master).map_err(self.failed("ioctl(TCFLSH)"))
    }

    /// Has the line discipline count up to a column. Only tab stops, every eight columns, and
    /// column 0 matter.
    fn move_to(
        &self,
        master: BorrowedFd<'_>,
        slave: BorrowedFd<'_>,
        plain: &mut Termios,
        column: u32,
        reached: u32,
    ) -> Result<(), FilesError> {
        let column = match column {
            0..1024 => column,
            far => 1024 + far % 8,
        };
        plain.oflag = libc::OPOST;
        self.set(slave, plain)?;
        // A backspace stops at column 0 and, unlike a return, leaves the line's beginning.
        for (byte, count) in [(0x08, reached), (b' ', column)] {
            let moves = vec![byte; count as usize];
            for moves in moves.chunks(1024) {
                self.write(slave, moves)?;
                self.discard(master)?;
            }
        }
        Ok(())
    }

    /// Writes all of it. What does not fit the line discipline at the other end waits in front.
    fn write(&self, fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), FilesError> {
        const PATIENCE: Duration = Duration::from_secs(5);
        let begun = Instant::now();
        let mut rest = bytes;
        while !rest.is_empty() {
            match write(fd, rest) {
                Ok(written) => rest = &rest[written..],
                // A worker makes room.
                Err(Errno::EAGAIN) if begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(errno) => return Err(self.failed("write")(errno)),
            }
        }
        Ok(())
    }

    /// Settings and modes, which from here on act on what passes.
    fn settle(&self, master: BorrowedFd<'_>, slave: Option<&OwnedFd>) -> Result<(), FilesError> {
        let state = self.state;
        self.set(master, &state.termios)?;
        if let Some(slave) = slave {
            self.check_input(slave.as_fd())?;
            self.write(master, &state.input.waiting)?;
            if state.stopped {
                self.type_byte(slave.as_fd(), state.termios.cc[libc::VSTOP])?;
            }
        }
        let ends = [Some(master), slave.map(AsFd::as_fd)];
        for (end, (off, exclusive)) in ends
            .into_iter()
            .zip(state.output_off.into_iter().zip(state.exclusive))
        {
            let Some(end) = end else { continue };
            if off {
                tty::output_off(end).map_err(self.failed("ioctl(TCXONC)"))?;
            }
            if exclusive {
                tty::set_exclusive(end).map_err(self.failed("ioctl(TIOCEXCL)"))?;
            }
        }
        if state.packet {
            tty::set_packet(master).map_err(self.failed("ioctl(TIOCPKT)"))?;
        }
        tty::set_lock(master, state.locked).map_err(self.failed("ioctl(TIOCSPTLCK)"))
    }

    /// The line discipline must have made of it what it was.
    fn check_input(&self, slave: BorrowedFd<'_>) -> Result<(), FilesError> {
        let input = &self.state.input;
        let canonical = self.state.termios.lflag & libc::ICANON != 0 && !self.external();
        let wanted = match canonical {
            // Ends of file are not counted (inq_canon()).
            true => {
                let eof = |end: &&u32| input.bytes.get(**end as usize) == Some(&0);
                self.complete()
                    .saturating_sub(input.line_ends.iter().filter(eof).count())
            }
            false => input.bytes.len(),
        };
        let found = tty::unread(slave).map_err(self.failed("ioctl(FIONREAD)"))?;
        if found as usize == wanted {
            return Ok(());
        }
        Err(FilesError::Changed {
            path: self.object.clone(),
            reason: format!("{found} of {wanted} typed bytes can be read"),
        })
    }
}
