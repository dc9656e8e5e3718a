//! Pseudo-terminals: settings, queues in both directions, modes, numbers, and the session.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::termios::{
    BaudRate, InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices as Char,
    Termios, cfmakeraw, cfsetspeed, tcgetattr, tcsetattr,
};

use super::probe::{check_pattern, eventually, pattern, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("pty_idle", idle),
    Entry::carried("pty_output", output),
    Entry::carried("pty_raw_input", raw_input),
    Entry::carried("pty_lines", lines),
    Entry::carried("pty_pushed", pushed),
    Entry::carried("pty_columns", columns),
    Entry::carried("pty_packet", packet),
    Entry::carried("pty_stopped", stopped),
    Entry::carried("pty_closed", closed),
    Entry::carried("pty_unopened", unopened),
    Entry::carried("pty_hung_up", hung_up),
    Entry::carried("pty_numbers", numbers),
];

/// Both ends of a new pseudo-terminal.
pub fn pair() -> Result<(File, File)> {
    let pair = openpty(None, None).context("openpty")?;
    Ok((File::from(pair.master), File::from(pair.slave)))
}

/// Changes the settings at once.
pub fn set(fd: &File, change: impl FnOnce(&mut Termios)) -> Result<()> {
    let mut termios = tcgetattr(fd)?;
    change(&mut termios);
    tcsetattr(fd, SetArg::TCSANOW, &termios).context("tcsetattr")
}

/// Reads without waiting for more than there is.
pub fn drain(mut from: &File) -> Result<Vec<u8>> {
    let flags = OFlag::from_bits_retain(fcntl(from, FcntlArg::F_GETFL)?);
    fcntl(from, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    let result = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(length) => all.extend(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    fcntl(from, FcntlArg::F_SETFL(flags))?;
    result.context("Read")?;
    Ok(all)
}

/// Reads until these bytes have come, which must be all and no others.
pub fn expect(from: &File, wanted: &[u8]) -> Result<()> {
    let mut all = Vec::new();
    eventually("enough bytes from the terminal", || {
        all.extend(drain(from)?);
        Ok(all.len() >= wanted.len())
    })?;
    ensure!(
        all == wanted,
        "{:?} came, not {:?}",
        String::from_utf8_lossy(&all),
        String::from_utf8_lossy(wanted)
    );
    Ok(())
}

fn number(master: &File) -> Result<u32> {
    let mut number = 0_u32;
    // SAFETY: the kernel writes one unsigned int.
    let done = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) };
    sys("TIOCGPTN", done.into())?;
    Ok(number)
}

/// An ioctl that takes or gives an int.
fn flag(fd: &File, request: u64, mut value: i32) -> Result<i32> {
    // SAFETY: for requests that read or write one int.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    sys("ioctl of a flag", done.into())?;
    Ok(value)
}

/// Settings, size, owner, modes and number of a terminal without anything in it.
fn idle(case: &Case) -> Result<()> {
    let (mut master, mut slave) = pair()?;
    set(&slave, |termios| {
        termios.local_flags &= !(LocalFlags::ECHO | LocalFlags::ISIG);
        termios.input_flags |= InputFlags::IUTF8 | InputFlags::IXANY;
        termios.output_flags |= OutputFlags::ONLRET;
        termios.control_chars[Char::VINTR as usize] = 7;
        // It keeps a speed, though it has none.
        let _ = cfsetspeed(termios, BaudRate::B9600);
        termios.control_chars[Char::VMIN as usize] = 3;
    })?;
    let size = libc::winsize {
        ws_row: 33,
        ws_col: 101,
        ws_xpixel: 7,
        ws_ypixel: 9,
    };
    // SAFETY: the kernel reads one winsize.
    let done = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    sys("TIOCSWINSZ", done.into())?;
    fcntl(&master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    flag(&slave, libc::TIOCEXCL, 0)?;
    let path = format!("/dev/pts/{}", number(&master)?);
    chown(&path, Some(1000), Some(1001))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
    let twin = slave.try_clone()?;
    let mut second = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(&path)?;
    let before = tcgetattr(&slave)?;

    case.ready()?;

    ensure!(tcgetattr(&slave)? == before, "The settings have changed");
    ensure!(
        tcgetattr(&master)? == before,
        "The master sees other settings"
    );
    // SAFETY: plain data for which zero is valid.
    let mut found: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one winsize.
    let done = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGWINSZ, &raw mut found) };
    sys("TIOCGWINSZ", done.into())?;
    let sizes = (found.ws_row, found.ws_col, found.ws_xpixel, found.ws_ypixel);
    ensure!(sizes == (33, 101, 7, 9), "The size is {sizes:?}");
    ensure!(
        format!("/dev/pts/{}", number(&master)?) == path,
        "Another number"
    );
    let link = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
    ensure!(
        link.as_os_str() == path.as_str(),
        "The slave is {}",
        link.display()
    );
    let found = fs::metadata(&path)?;
    let rights = (found.uid(), found.gid(), found.mode() & 0o777);
    ensure!(
        rights == (1000, 1001, 0o640),
        "Owner and mode are {rights:?}"
    );
    const TIOCGEXCL: u64 = 0x8004_5440;
    ensure!(flag(&slave, TIOCGEXCL, 0)? == 1, "It is not exclusive");
    for (fd, nonblocking) in [(&master, true), (&slave, false), (&second, true)] {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        ensure!(
            flags.contains(OFlag::O_NONBLOCK) == nonblocking,
            "O_NONBLOCK of {} has changed",
            fd.as_raw_fd()
        );
    }
    slave.write_all(b"one ")?;
    second.write_all(b"two ")?;
    (&twin).write_all(b"three")?;
    expect(&master, b"one two three")?;
    master.write_all(b"typed\n")?;
    let mut text = [0; 6];
    slave.read_exact(&mut text)?;
    ensure!(&text == b"typed\n", "The slave reads {text:?}");
    drop((slave, twin, second));
    let error = master.read(&mut text).err().and_then(|e| e.raw_os_error());
    ensure!(
        error == Some(libc::EIO),
        "Reading after the last slave's end: {error:?}; somebody else holds it"
    );
    Ok(())
}

/// More output than the line discipline has room for, which the master reads afterwards.
fn output(case: &Case) -> Result<()> {
    let (master, mut slave) = pair()?;
    set(&slave, cfmakeraw)?;
    slave.write_all(&pattern(1, 9000))?;
    let (cooked_master, mut cooked) = pair()?;
    cooked.write_all(b"line one\nline two\n")?;
    case.ready()?;
    let mut all = Vec::new();
    eventually("all output", || {
        all.extend(drain(&master)?);
        Ok(all.len() >= 9000)
    })?;
    ensure!(all.len() == 9000, "{} bytes came", all.len());
    check_pattern("the output", 1, &all)?;
    expect(&cooked_master, b"line one\r\nline two\r\n")?;
    slave.write_all(b"more")?;
    expect(&master, b"more")
}

/// More raw input than the line discipline has room for.
fn raw_input(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    set(&slave, cfmakeraw)?;
    master.write_all(&pattern(2, 7000))?;
    let mut head = [0; 1000];
    (&slave).read_exact(&mut head)?;
    case.ready()?;
    let mut all = head.to_vec();
    eventually("all input", || {
        all.extend(drain(&slave)?);
        Ok(all.len() >= 7000)
    })?;
    ensure!(all.len() == 7000, "{} bytes came", all.len());
    check_pattern("the input", 2, &all)?;
    master.write_all(b"\x03more\r")?;
    expect(&slave, b"\x03more\r")
}

/// Canonical mode: lines, an end of file, an own delimiter, characters typed literally, and a
/// line that is edited further on.
fn lines(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    set(&slave, |termios| {
        termios.control_chars[Char::VEOL as usize] = b';';
    })?;
    // Ctrl-V, then what would end the line or be taken away.
    master.write_all(b"first\nsta;\x04a\x16\nb\x16\x04\x16\x7f\x16\x16c\nhalf a lineX")?;
    // Each literal character shows as such once it is typed: ^ with a step back before it.
    expect(
        &master,
        b"first\r\nsta;a^\x08^Jb^\x08^D^\x08^?^\x08^Vc\r\nhalf a lineX",
    )?;

    case.ready()?;

    let line = || -> Result<Vec<u8>> {
        let mut buffer = [0; 100];
        let length = (&slave).read(&mut buffer)?;
        Ok(buffer[..length].to_vec())
    };
    for wanted in [&b"first\n"[..], b"sta;", b"", b"a\nb\x04\x7f\x16c\n"] {
        let found = line()?;
        ensure!(found == wanted, "A line is {found:?}, not {wanted:?}");
    }
    let left = flag(&slave, libc::FIONREAD, 0)?;
    ensure!(left == 0, "{left} bytes are left to read");
    drain(&master)?;
    // One character is rubbed out, and the line ends.
    master.write_all(b"\x7f!\n")?;
    let last = line()?;
    ensure!(last == b"half a line!\n", "The last line is {last:?}");
    expect(&master, b"\x08 \x08!\r\n")
}

/// What was typed before canonical mode came on is read without a delimiter.
fn pushed(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    set(&slave, |termios| {
        termios.local_flags &= !(LocalFlags::ICANON | LocalFlags::ECHO);
    })?;
    master.write_all(b"typed\nearly")?;
    eventually("early bytes", || Ok(flag(&slave, libc::FIONREAD, 0)? == 11))?;
    set(&slave, |termios| termios.local_flags |= LocalFlags::ICANON)?;
    master.write_all(b" and late\n")?;
    eventually("late bytes", || Ok(flag(&slave, libc::FIONREAD, 0)? == 21))?;
    case.ready()?;
    let mut buffer = [0; 100];
    let length = (&slave).read(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"typed\nearly",
        "First {:?}",
        &buffer[..length]
    );
    let length = (&slave).read(&mut buffer)?;
    ensure!(
        &buffer[..length] == b" and late\n",
        "Then {:?}",
        &buffer[..length]
    );
    Ok(())
}

/// Tabs, of output and rubbed out, depend on the columns that were reached.
fn columns(case: &Case) -> Result<()> {
    let (mut master, mut slave) = pair()?;
    set(&slave, |termios| {
        termios.output_flags |= OutputFlags::XTABS;
        termios.local_flags |= LocalFlags::ECHOE;
    })?;
    slave.write_all(b"abc> ")?;
    master.write_all(b"\tz")?;
    expect(&master, b"abc>    z")?;
    let (wide_master, mut wide) = pair()?;
    set(&wide, |termios| termios.output_flags |= OutputFlags::XTABS)?;
    wide.write_all(&[b'.'; 3003])?;
    drain(&wide_master)?;
    expect(&wide_master, b"")?;

    case.ready()?;

    // The z, then the tab, which took three columns.
    master.write_all(b"\x7f\x7f")?;
    expect(&master, b"\x08 \x08\x08\x08\x08")?;
    slave.write_all(b"\t|")?;
    expect(&master, b"   |")?;
    let mut all = drain(&wide_master)?;
    all.retain(|byte| *byte != b'.');
    ensure!(all.is_empty(), "Output that nobody wrote: {all:?}");
    wide.write_all(b"\t|")?;
    // 3003 = 375 * 8 + 3.
    expect(&wide_master, b"     |")
}

/// Packet mode: data is marked as such, and a flush is told.
fn packet(case: &Case) -> Result<()> {
    let (mut master, mut slave) = pair()?;
    flag(&master, libc::TIOCPKT, 1)?;
    slave.write_all(b"data")?;
    case.ready()?;
    let mut buffer = [9; 100];
    let length = master.read(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"\0data",
        "The packet is {:?}",
        &buffer[..length]
    );
    // SAFETY: takes an integer.
    let done = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TCFLSH, libc::TCIFLUSH) };
    sys("TCFLSH", done.into())?;
    let length = master.read(&mut buffer)?;
    // TIOCPKT_FLUSHREAD.
    let status = 1;
    ensure!(
        buffer[..length] == [status],
        "The status is {:?}",
        &buffer[..length]
    );
    Ok(())
}

/// Output that is held back: by Ctrl-S on one terminal, by tcflow(3) on another.
fn stopped(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    let (other_master, other) = pair()?;
    let blocked = |mut slave: &File| {
        let error = slave.write(b"x").err().map(|error| error.kind());
        error == Some(ErrorKind::WouldBlock)
    };
    for slave in [&slave, &other] {
        fcntl(slave, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    }
    master.write_all(b"\x13")?;
    eventually("Ctrl-S to act", || Ok(blocked(&slave)))?;
    drain(&master)?;
    nix::sys::termios::tcflow(&other, nix::sys::termios::FlowArg::TCOOFF)?;

    case.ready()?;

    ensure!(blocked(&slave), "Output goes on without Ctrl-Q");
    ensure!(blocked(&other), "Output goes on without TCOON");
    master.write_all(b"\x11")?;
    eventually("Ctrl-Q to act", || Ok((&slave).write(b"on").is_ok()))?;
    expect(&master, b"on")?;
    (&other_master).write_all(b"\x11")?;
    nix::sys::termios::tcflow(&other, nix::sys::termios::FlowArg::TCOON)?;
    (&other).write_all(b"on too")?;
    expect(&other_master, b"on too")
}

/// The slave was open and is not any more; it is locked, and holds output that was not read.
fn closed(case: &Case) -> Result<()> {
    let (mut master, mut slave) = pair()?;
    let path = format!("/dev/pts/{}", number(&master)?);
    slave.write_all(b"last words")?;
    drop(slave);
    flag(&master, libc::TIOCSPTLCK, 1)?;

    case.ready()?;

    let mut buffer = [0; 100];
    let length = master.read(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"last words",
        "It held {:?}",
        &buffer[..length]
    );
    let error = master
        .read(&mut buffer)
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(
        error == Some(libc::EIO),
        "Reading without a slave: {error:?}"
    );
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&path)
    };
    let error = open().err().and_then(|e| e.raw_os_error());
    ensure!(
        error == Some(libc::EIO),
        "Opening it while it is locked: {error:?}"
    );
    flag(&master, libc::TIOCSPTLCK, 0)?;
    open()?.write_all(b"again")?;
    expect_once(&mut master, b"again")
}

fn expect_once(master: &mut File, wanted: &[u8]) -> Result<()> {
    let mut bytes = vec![0; wanted.len()];
    master.read_exact(&mut bytes)?;
    ensure!(bytes == wanted, "{bytes:?} came");
    Ok(())
}

/// A master alone: its slave was never open, so there is no end of file yet.
fn unopened(case: &Case) -> Result<()> {
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open("/dev/ptmx")?;
    set(&master, |termios| termios.local_flags &= !LocalFlags::ECHO)?;
    let before = tcgetattr(&master)?;
    case.ready()?;
    ensure!(tcgetattr(&master)? == before, "The settings have changed");
    let error = (&master)
        .read(&mut [0; 10])
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(
        error == Some(libc::EAGAIN),
        "Reading before there is a slave: {error:?}"
    );
    flag(&master, libc::TIOCSPTLCK, 0)?;
    let path = format!("/dev/pts/{}", number(&master)?);
    let mut slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)?;
    (&master).write_all(b"typed\n")?;
    let mut text = [0; 6];
    slave.read_exact(&mut text)?;
    ensure!(&text == b"typed\n", "The slave reads {text:?}");
    slave.write_all(b"out")?;
    expect(&master, b"out")
}

/// The master is closed: end of file and EIO, and the number is still taken.
fn hung_up(case: &Case) -> Result<()> {
    let (master, mut slave) = pair()?;
    let name = format!("/dev/pts/{} (deleted)", number(&master)?);
    drop(master);
    case.ready()?;
    let length = slave.read(&mut [0; 10])?;
    ensure!(
        length == 0,
        "{length} bytes came from a terminal that is hung up"
    );
    let error = slave.write(b"x").err().and_then(|e| e.raw_os_error());
    ensure!(error == Some(libc::EIO), "Writing to it: {error:?}");
    let link = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
    ensure!(
        link.as_os_str() == name.as_str(),
        "It is now {}",
        link.display()
    );
    ensure!(
        tcgetattr(slave.as_fd()).err() == Some(Errno::EIO),
        "It has settings"
    );
    Ok(())
}

/// Several terminals, with free numbers between theirs.
fn numbers(case: &Case) -> Result<()> {
    // More free numbers in between than others take that run beside this one.
    let pairs = (0..24).map(|_| pair()).collect::<Result<Vec<_>>>()?;
    let pairs: Vec<_> = pairs.into_iter().skip(7).step_by(8).collect();
    let before = pairs
        .iter()
        .map(|(master, _)| number(master))
        .collect::<Result<Vec<_>>>()?;
    case.ready()?;
    for ((master, slave), before) in pairs.iter().zip(&before) {
        let now = number(master)?;
        ensure!(now == *before, "{before} has become {now}");
        let text = format!("terminal {now}");
        let mut slave: &File = slave;
        slave.write_all(text.as_bytes())?;
        expect(master, text.as_bytes())?;
    }
    let (fresh, _slave) = pair()?;
    let fresh = number(&fresh)?;
    ensure!(!before.contains(&fresh), "{fresh} was given out twice");
    ensure!(
        fresh < before[before.len() - 1],
        "A free number is still taken: the new terminal has {fresh}"
    );
    Ok(())
}
