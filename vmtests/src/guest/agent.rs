//! Serves the host's requests.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::init::uptime_ms;
use super::reaper::Reaper;
use crate::protocol::{
    CHUNK, Hello, OUTPUT_LIMIT, PORT_NAME, Reply, Request, Status, ToGuest, ToHost, encode,
    from_hex, to_hex,
};

/// Says hello and answers requests until the port breaks.
///
/// # Errors
/// If the port cannot be found, opened, read or written.
pub fn serve(reaper: &Arc<Reaper>, started: u64) -> Result<()> {
    let path = port()?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("Open {}", path.display()))?;
    let out = Arc::new(Mutex::new(port.try_clone()?));
    send(&out, &ToHost::Hello(identity(started)?))?;
    let mut lines = BufReader::new(port);
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines
            .read_until(b'\n', &mut line)
            .context("Read a request")?
            == 0
        {
            // Nobody is connected on the host's side.
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        let Ok(message) = serde_json::from_slice::<ToGuest>(&line) else {
            continue;
        };
        let (out, reaper) = (Arc::clone(&out), Arc::clone(reaper));
        std::thread::spawn(move || {
            let reply =
                obey(&reaper, started, message.request).unwrap_or_else(|error| Reply::Failed {
                    message: format!("{error:#}"),
                });
            if let Err(error) = send(
                &out,
                &ToHost::Reply {
                    id: message.id,
                    reply,
                },
            ) {
                eprintln!("guestd: {error:#}");
            }
        });
    }
}

/// The character device of our port.
fn port() -> Result<PathBuf> {
    for _ in 0..100 {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if name.trim() == PORT_NAME && device.exists() {
                return Ok(device);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(anyhow!(
        "No virtio-serial port {PORT_NAME}; is virtio_console loaded?"
    ))
}

fn identity(started: u64) -> Result<Hello> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("Read boot_id")?;
    let release = nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned();
    Ok(Hello {
        boot_id: boot_id.trim().to_owned(),
        release,
        uptime_ms: uptime_ms(),
        init_ms: started,
    })
}

fn send(out: &Mutex<File>, message: &ToHost) -> Result<()> {
    let line = encode(message)?;
    out.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .write_all(&line)
        .context("Write to the host")
}

fn obey(reaper: &Reaper, started: u64, request: Request) -> Result<Reply> {
    match request {
        Request::Exec {
            argv,
            env,
            timeout_ms,
        } => exec(reaper, &argv, env, Duration::from_millis(timeout_ms)),
        Request::Spawn { argv, env, log } => spawn(reaper, &argv, env, log.as_deref()),
        Request::Wait { pid, timeout_ms } => Ok(Reply::Waited {
            status: reaper.wait(pid, Duration::from_millis(timeout_ms)),
        }),
        Request::AwaitFile {
            path,
            exists,
            timeout_ms,
        } => {
            let deadline = Instant::now() + Duration::from_millis(timeout_ms);
            let met = || Path::new(&path).exists() == exists;
            while !met() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(Reply::Awaited(met()))
        }
        Request::Kill { pid, signal } => {
            let signal = Signal::try_from(signal)?;
            kill(Pid::from_raw(pid), signal).with_context(|| format!("Send {signal} to {pid}"))?;
            Ok(Reply::Done)
        }
        Request::Read { path, offset } => read(&path, offset),
        Request::Write { path, offset, data } => write(&path, offset, &data),
        Request::Install { from, to, mode } => {
            fs::set_permissions(&from, fs::Permissions::from_mode(mode))
                .with_context(|| format!("Set the mode of {from}"))?;
            fs::rename(&from, &to).with_context(|| format!("Rename {from} to {to}"))?;
            Ok(Reply::Done)
        }
        Request::Identify => Ok(Reply::Identity(identity(started)?)),
    }
}

fn command(argv: &[String], env: Vec<(String, String)>) -> Result<Command> {
    let (program, arguments) = argv.split_first().context("Empty command")?;
    let mut command = Command::new(program);
    command.args(arguments);
    command
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
        .env("HOME", "/root");
    command.envs(env).current_dir("/root").stdin(Stdio::null());
    Ok(command)
}

fn exec(
    reaper: &Reaper,
    argv: &[String],
    env: Vec<(String, String)>,
    timeout: Duration,
) -> Result<Reply> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Files, not pipes: what the command leaves running must not hold up its
    // result.
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let output = |suffix: &str| -> Result<(PathBuf, File)> {
        let path = PathBuf::from(format!("/run/guestd.{}.{number}.{suffix}", uptime_ms()));
        let file = OpenOptions::new()
            .create_new(true)
            .read(true)
            .append(true)
            .open(&path);
        let file = file.with_context(|| format!("Create {}", path.display()))?;
        Ok((path, file))
    };
    let (out_path, mut out) = output("out")?;
    let (err_path, mut err) = output("err")?;
    let mut command = command(argv, env)?;
    command
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .process_group(0);
    let spawned = reaper
        .spawn(&mut command)
        .with_context(|| format!("Run {}", argv[0]));
    let status = spawned.map(|pid| {
        reaper.wait(pid, timeout).unwrap_or_else(|| {
            // Its group may be gone already: then there is nobody to wait for.
            let _ = kill(Pid::from_raw(-pid), Signal::SIGKILL);
            reaper.wait(pid, Duration::from_secs(5));
            Status::TimedOut
        })
    });
    let tail = |file: &mut File| -> Result<String> {
        let size = file.metadata()?.size();
        let limit = u64::try_from(OUTPUT_LIMIT)?;
        file.seek(SeekFrom::Start(size.saturating_sub(limit)))?;
        let mut data = Vec::new();
        file.take(limit).read_to_end(&mut data)?;
        Ok(to_hex(&data))
    };
    let (stdout, stderr) = (tail(&mut out)?, tail(&mut err)?);
    fs::remove_file(out_path)?;
    fs::remove_file(err_path)?;
    Ok(Reply::Exec {
        status: status?,
        stdout,
        stderr,
    })
}

fn spawn(
    reaper: &Reaper,
    argv: &[String],
    env: Vec<(String, String)>,
    log: Option<&str>,
) -> Result<Reply> {
    let mut with_session = vec!["setsid".to_owned()];
    with_session.extend_from_slice(argv);
    let mut command = command(&with_session, env)?;
    if let Some(log) = log {
        if let Some(dir) = Path::new(log).parent() {
            fs::create_dir_all(dir).with_context(|| format!("Create {}", dir.display()))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(log);
        let file = file.with_context(|| format!("Open {log}"))?;
        command.stdout(file.try_clone()?).stderr(file);
    } else {
        command.stdout(Stdio::null()).stderr(Stdio::null());
    }
    let pid = reaper
        .spawn(&mut command)
        .with_context(|| format!("Start {}", argv[0]))?;
    Ok(Reply::Spawned { pid })
}

fn read(path: &str, offset: u64) -> Result<Reply> {
    let mut file = File::open(path).with_context(|| format!("Open {path}"))?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))
            .with_context(|| format!("Seek in {path}"))?;
    }
    let mut data = Vec::new();
    file.take(u64::try_from(CHUNK)?)
        .read_to_end(&mut data)
        .with_context(|| format!("Read {path}"))?;
    Ok(Reply::Data {
        eof: data.len() < CHUNK,
        data: to_hex(&data),
    })
}

fn write(path: &str, offset: u64, data: &str) -> Result<Reply> {
    let data = from_hex(data).context("Data is not hex")?;
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    let file = file
        .as_mut()
        .map_err(|error| anyhow!("Open {path}: {error}"))?;
    // Special files (sysfs, /proc) can be written but neither cut nor sought.
    if file.metadata()?.is_file() && !path.starts_with("/proc/") && !path.starts_with("/sys/") {
        file.set_len(offset)
            .with_context(|| format!("Cut {path}"))?;
        file.seek(SeekFrom::Start(offset))?;
    }
    file.write_all(&data)
        .with_context(|| format!("Write {path}"))?;
    Ok(Reply::Done)
}
