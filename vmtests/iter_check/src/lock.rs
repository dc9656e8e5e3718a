//! The network lock, over loopback connections of our own.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tracker::bpf::features::cgroup2_mount;
use tracker::bpf::netlock::{Drops, NetLock};

/// Longer than any retransmission that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the lock has dropped something more than `before`.
fn wait_for_drops(lock: &NetLock, before: Drops) -> Result<Drops> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let now = lock.drops()?;
        if now != before {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("nothing was dropped")
}

fn connected() -> Result<(TcpStream, TcpStream, SocketAddr)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let client = TcpStream::connect(address)?;
    let (server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    Ok((client, server, address))
}

fn nothing_to_read(stream: &TcpStream) -> Result<bool> {
    stream.set_nonblocking(true)?;
    let result = (&*stream).read(&mut [0; 8]);
    stream.set_nonblocking(false)?;
    Ok(result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock))
}

pub fn connection() -> Result<()> {
    let (mut client, mut server, _) = connected()?;
    let (mut other, mut unlocked, _) = connected()?;
    let mut lock = NetLock::load(0)?;
    lock.add_connection(server.local_addr()?, server.peer_addr()?)?;
    ensure!(!lock.is_engaged(), "engaged by itself");
    client.write_all(b"before")?;
    let mut buffer = [0; 6];
    server.read_exact(&mut buffer)?;

    lock.engage()?;
    let start = lock.drops()?;
    client.write_all(b"during")?;
    let drops = wait_for_drops(&lock, start)?;
    ensure!(drops.ingress > start.ingress, "ingress {drops:?}");
    ensure!(nothing_to_read(&server)?, "data came through the lock");
    server.write_all(b"answer")?;
    let start = drops;
    while wait_for_drops(&lock, start)?.egress == start.egress {}
    ensure!(nothing_to_read(&client)?, "data left through the lock");
    other.write_all(b"free")?;
    unlocked
        .read_exact(&mut [0; 4])
        .context("another connection is not locked")?;

    lock.release()?;
    ensure!(!lock.is_engaged(), "still engaged");
    server
        .read_exact(&mut buffer)
        .context("retransmission after the lock")?;
    ensure!(&buffer == b"during", "{buffer:?}");
    client.read_exact(&mut buffer)?;
    ensure!(&buffer == b"answer", "{buffer:?}");
    Ok(())
}

pub fn listener() -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let mut lock = NetLock::load(0)?;
    lock.add_listener(listener.local_addr()?)?;
    lock.engage()?;
    let start = lock.drops()?;
    let connecting = std::thread::spawn(move || {
        TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), PATIENCE)
    });
    wait_for_drops(&lock, start)?;
    ensure!(!connecting.is_finished(), "a SYN was answered");
    // the port stays silent even when nobody listens any more
    drop(listener);
    let start = lock.drops()?;
    wait_for_drops(&lock, start)?;
    ensure!(
        !connecting.is_finished(),
        "a SYN to a closed port was answered"
    );
    drop(lock);
    let result = connecting
        .join()
        .map_err(|_| anyhow::anyhow!("connect panicked"))?;
    let refused = result.err().context("connected to a closed port")?;
    ensure!(refused.kind() == ErrorKind::ConnectionRefused, "{refused}");
    Ok(())
}

/// New connections are held off while old ones go on; then nothing goes on.
pub fn new_only() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    let mut lock = NetLock::load(0)?;
    lock.add_listener(address)?;
    lock.add_connection(server.local_addr()?, server.peer_addr()?)?;
    lock.hold_new()?;
    lock.engage()?;
    let start = lock.drops()?;
    let connecting = std::thread::spawn(move || TcpStream::connect_timeout(&address, PATIENCE));
    let start = wait_for_drops(&lock, start)?;
    ensure!(start.egress == 0, "something else was dropped: {start:?}");
    let mut buffer = [0; 6];
    client.write_all(b"during")?;
    server
        .read_exact(&mut buffer)
        .context("a connection that is there already")?;
    server.write_all(b"answer")?;
    client.read_exact(&mut buffer)?;
    lock.silence()?;
    let start = lock.drops()?;
    client.write_all(b"x")?;
    wait_for_drops(&lock, start).context("silence")?;
    ensure!(nothing_to_read(&server)?, "data came through the lock");
    lock.release()?;
    server
        .read_exact(&mut [0])
        .context("retransmission after the lock")?;
    let result = connecting
        .join()
        .map_err(|_| anyhow::anyhow!("connect panicked"))?;
    result.context("a new connection after the lock")?;
    Ok(())
}

pub fn addresses() -> Result<()> {
    // IPv6, a port locked by [::] for both versions, and UDP
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        println!("no IPv6 here: its lock is not checked");
        return Ok(());
    };
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    udp.set_read_timeout(Some(PATIENCE))?;
    let sender = UdpSocket::bind("127.0.0.1:0")?;

    let mut lock = NetLock::load(0)?;
    lock.add_connection(server.local_addr()?, server.peer_addr()?)?;
    lock.add_udp(SocketAddr::from(([0; 8], udp.local_addr()?.port())))?;
    lock.engage()?;
    let start = lock.drops()?;
    client.write_all(b"x")?;
    let start = wait_for_drops(&lock, start).context("IPv6 connection")?;
    ensure!(nothing_to_read(&server)?, "data came through the lock");
    // a retransmission of the connection above may be counted too: only arrival is judged
    sender.send_to(b"lost", udp.local_addr()?)?;
    wait_for_drops(&lock, start).context("UDP")?;
    lock.release()?;
    server
        .read_exact(&mut [0])
        .context("retransmission after the lock")?;
    sender.send_to(b"kept", udp.local_addr()?)?;
    let mut buffer = [0; 4];
    udp.recv(&mut buffer)?;
    ensure!(&buffer == b"kept", "a locked datagram was delivered");
    Ok(())
}

/// Everything of a cgroup, by the cgroup above it.
pub fn cgroup() -> Result<()> {
    let outer = cgroup2_mount()?.join(format!("iter-lock-{}", std::process::id()));
    let inner = outer.join("inner");
    fs::create_dir(&outer)?;
    fs::create_dir(&inner)?;
    let mine = fs::read_to_string("/proc/self/cgroup")?;
    let home = mine
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("no cgroup")?;
    let home = cgroup2_mount()?.join(home);
    let pid = std::process::id().to_string();
    let (mut client, mut unlocked, _) = connected()?;
    // sockets belong to the cgroup they are made in
    fs::write(inner.join("cgroup.procs"), &pid)?;
    let inside = connected();
    fs::write(home.join("cgroup.procs"), &pid)?;
    let result = inside.and_then(|(mut near, mut far, _)| {
        let mut lock = NetLock::load(0)?;
        lock.add_cgroup(fs::metadata(&outer)?.ino())?;
        lock.engage()?;
        let start = lock.drops()?;
        near.write_all(b"x")?;
        wait_for_drops(&lock, start)?;
        ensure!(nothing_to_read(&far)?, "data came through the lock");
        client.write_all(b"x")?;
        unlocked
            .read_exact(&mut [0])
            .context("another cgroup is not locked")?;
        drop(lock);
        far.read_exact(&mut [0])
            .context("retransmission after the lock")?;
        Ok(())
    });
    fs::remove_dir(&inner)?;
    fs::remove_dir(&outer)?;
    result
}

/// A directory for pins, removed with what is in it.
struct PinDir(PathBuf);

impl PinDir {
    fn new() -> Self {
        Self(Path::new("/sys/fs/bpf").join(format!("iter-check-{}", std::process::id())))
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        if self.0.exists() {
            fs::remove_dir_all(&self.0).ok();
        }
    }
}

pub fn pinned() -> Result<()> {
    // the guest's init does not mount it
    fs::create_dir_all("/sys/fs/bpf").ok();
    let bpffs = nix::sys::statfs::statfs("/sys/fs/bpf")?;
    if bpffs.filesystem_type() != nix::sys::statfs::BPF_FS_MAGIC {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), flags, None::<&str>)
            .context("Mount bpf on /sys/fs/bpf")?;
    }
    let (mut client, mut server, _) = connected()?;
    let dir = PinDir::new();
    let mut lock = NetLock::load(0)?;
    lock.add_connection(server.local_addr()?, server.peer_addr()?)?;
    lock.engage()?;
    lock.pin(&dir.0)?;
    drop(lock);

    let mut lock = NetLock::open_pinned(&dir.0)?;
    ensure!(lock.is_engaged(), "not engaged any more");
    let start = lock.drops()?;
    client.write_all(b"x")?;
    wait_for_drops(&lock, start).context("the lock outlives its maker")?;
    lock.release()?;
    ensure!(!dir.0.exists(), "pins are left");
    server
        .read_exact(&mut [0])
        .context("retransmission after the lock")?;
    Ok(())
}

pub fn all_tcp() -> Result<()> {
    let (mut client, mut server, address) = connected()?;
    let mut lock = NetLock::load(0)?;
    lock.add_all_tcp()?;
    lock.engage()?;
    let start = lock.drops()?;
    client.write_all(b"x")?;
    wait_for_drops(&lock, start)?;
    // nobody listens at the address any more: without the lock there would be a RST
    let attempt = TcpStream::connect_timeout(&address, Duration::from_millis(500));
    ensure!(
        attempt.is_err_and(|e| e.kind() == ErrorKind::TimedOut),
        "a RST was sent"
    );
    lock.narrow()?;
    server
        .read_exact(&mut [0])
        .context("retransmission after the lock")?;
    Ok(())
}
