//! `tracker inspect`: prints what an image holds.

use crate::error::{ExitCode, HasExitCode};
use crate::image::{
    DirectoryStore, Image, ImageError, Pages, RangeStore, Store, StoreError, decode,
};
use crate::model::frozen::{
    Application, Backing, FileKind, Mount, MountSource, Process, SyscallInProgress,
};
use clap::Args;
use std::path::PathBuf;

/// Arguments of `tracker inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The image's directory, or the device it was left on (/dev/pmemN)
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// Print everything but the pages as JSON
    #[arg(long)]
    json: bool,
}

/// Why an image was not printed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Its carrier.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its metadata.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl HasExitCode for InspectError {
    fn exit_code(&self) -> ExitCode {
        ExitCode::ImageInvalid
    }
}

/// Prints an image, all pages of which are compared with their checksums first.
///
/// # Errors
/// It is none, or is damaged.
pub fn run(args: &InspectArgs) -> Result<ExitCode, InspectError> {
    let store: Box<dyn Store> = if args.image.is_dir() {
        Box::new(DirectoryStore::open(&args.image)?)
    } else {
        Box::new(RangeStore::open(&args.image)?)
    };
    let image = decode(&store.metadata()?)?;
    for application in &image.applications {
        Pages::new(store.as_ref(), &image.slots).verify(application)?;
    }
    if args.json {
        super::print_json(&json(&image));
        return Ok(ExitCode::Done);
    }
    for application in &image.applications {
        print(application);
    }
    Ok(ExitCode::Done)
}

fn json(image: &Image) -> serde_json::Value {
    // Address spaces and the like have ids that serialize as numbers, which JSON takes as keys.
    serde_json::json!({
        "system": image.system,
        "applications": image.applications,
    })
}

fn print(app: &Application) {
    let header = &app.header;
    println!(
        "{} (cgroup {}), from Linux {}",
        header.name, header.cgroup, header.kernel_release
    );
    if !header.command.is_empty() {
        println!("  started as: {}", header.command.join(" "));
    }
    for set in &header.semaphores {
        println!(
            "  semaphore set {}, {} values",
            set.id,
            set.semaphores.len()
        );
    }
    for queue in &header.message_queues {
        let bytes: usize = queue.messages.iter().map(|m| m.mtext.len()).sum();
        let count = queue.messages.len();
        println!(
            "  message queue {}, {count} messages of {bytes} bytes",
            queue.id
        );
    }
    if let Some(names) = &header.namespaces.uts {
        println!(
            "  host name {}, domain {}",
            String::from_utf8_lossy(&names.node),
            String::from_utf8_lossy(&names.domain)
        );
    }
    for mount in &header.namespaces.mounts {
        println!("  {}", mount_line(mount));
    }
    for process in &app.processes {
        print_process(app, process);
    }
}

fn mount_line(mount: &Mount) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let shows = match &mount.source {
        MountSource::Machine { point, path, kind } => {
            let whole = text(point);
            format!("{}/{} ({kind})", whole.trim_end_matches('/'), text(path))
        }
        MountSource::Own { mount, path } => format!("/{} of its mount {mount}", text(path)),
        MountSource::Proc { .. } => "procfs".to_owned(),
        MountSource::Tmpfs { entries, .. } => {
            format!("a tmpfs of its own, {} names", entries.len())
        }
    };
    format!("mount {}: {shows}", text(&mount.point))
}

fn print_process(app: &Application, process: &Process) {
    let comm = process.threads.first().map_or(&[][..], |t| &t.comm);
    println!(
        "  PID {} {} (session {}, group {})",
        process.pid,
        String::from_utf8_lossy(comm),
        process.sid,
        process.pgid
    );
    if let Some(status) = process.zombie {
        println!("    zombie, wait status {status:#x}");
        return;
    }
    println!("    program {}", String::from_utf8_lossy(&process.exe.path));
    if let Some(mm) = app.mms.get(&process.mm) {
        let pages: u64 = mm.pages.iter().map(|run| run.pages).sum();
        let (count, kib) = (mm.vmas.len(), pages * 4);
        println!("    {count} mappings, {kib} KiB of private memory");
        for vma in &mm.vmas {
            if let Backing::AioRing(ring) = &vma.backing
                && ring.max_reqs.is_some()
            {
                let unread = ring.unread();
                println!("    AIO context {:x}, {unread} events not read", vma.start);
            }
        }
    }
    for thread in &process.threads {
        let call = match thread.syscall {
            SyscallInProgress::None => String::new(),
            SyscallInProgress::RestartBlock { .. } | SyscallInProgress::Reissue { .. } => {
                format!(", in system call {}", thread.regs.orig_rax)
            }
        };
        println!("    thread {} at {:#x}{call}", thread.tid, thread.regs.rip);
    }
    let fds = app.files.get(&process.files).map_or(&[][..], |t| &t.fds);
    for entry in fds {
        let kind = app
            .ofds
            .get(&entry.ofd)
            .map_or("unknown", |f| name(&f.kind));
        println!("    fd {} {kind}", entry.fd);
    }
}

fn name(kind: &FileKind) -> &'static str {
    match kind {
        FileKind::Regular(_) => "file",
        FileKind::Directory(_) => "directory",
        FileKind::CharDevice { .. } => "character device",
        FileKind::Content(_) => "memfd or deleted file",
        FileKind::Pipe { .. } => "pipe",
        FileKind::Fifo { .. } => "FIFO",
        FileKind::Pty { .. } => "pseudo-terminal",
        FileKind::Eventfd { .. } => "eventfd",
        FileKind::Timerfd(_) => "timerfd",
        FileKind::Signalfd { .. } => "signalfd",
        FileKind::Epoll { .. } => "epoll",
        FileKind::Inotify { .. } => "inotify",
        FileKind::Fanotify(_) => "fanotify",
        FileKind::Pidfd { .. } => "pidfd",
        FileKind::Socket(_) => "socket",
        FileKind::IoUring(_) => "io_uring",
        FileKind::Pressure { .. } => "pressure trigger",
        FileKind::Mqueue { .. } => "POSIX message queue",
    }
}
