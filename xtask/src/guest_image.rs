//! Builds the guest image: Debian 12, two stock kernels with the initrds that
//! the distribution makes, the services that the tests move. No mount and no
//! loop device: mmdebstrap fills a directory, mke2fs copies it into a file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vmtests::image::{Image, Kernel, cache_dir};

use crate::apt::{self, SUITE};
use crate::{find_program, shell};

/// Beside the kernels and what Debian calls essential.
const PACKAGES: &[&str] = &[
    // What is moved to the next kernel.
    "redis-server",
    "redis-tools",
    "memcached",
    "nginx-light",
    // Has timers on the CPU clocks of its threads.
    "haproxy",
    // What is checkpointed with clients connected: many processes, many threads, sessions on
    // terminals.
    "postgresql",
    "postgresql-contrib",
    // Uses io_uring.
    "mariadb-server-core",
    "mariadb-client-core",
    "nodejs",
    // Has the compiler's module as well, only not its command.
    "openjdk-17-jre-headless",
    "openssh-server",
    // Confines a program that is to be refused.
    "apparmor",
    // What tracker links against.
    "libelf1",
    "zlib1g",
    // The guest's own housekeeping and the tests' tools.
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "lz4",
    "mount",
    "nftables",
    "procps",
    "python3-minimal",
    "strace",
    "util-linux",
    "zstd",
    // The peer in the benchmarks.
    "criu",
    // A load generator with keep-alive (ab).
    "apache2-utils",
    // Runs the agent as a service; the guest's usual init stays our own.
    "dbus",
    "systemd",
    // Lists what the kernel holds of BPF.
    "bpftool",
];

/// Modules in the initrds, beside those that initramfs-tools adds anyway:
/// the VM's devices and the memory that survives a kexec.
const INITRD_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "ext4",
    "nd_e820",
    "nd_pmem",
];

/// Not needed in a test guest; keeps the image small.
const EXCLUDED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
];

const SIZE: &str = "4G";

/// The guest's `/sbin/init`. The programs come from the second disk at the
/// first boot; after a kexec they are in the root filesystem already.
const INIT: &str = r#"#!/bin/sh
guestd=/usr/lib/tracker/tests/guestd
[ -x $guestd ] || tar -xf /dev/vdb -C / || exec sh
exec $guestd "$@"
"#;

/// Lets the host drive a guest whose init is systemd; its target starts none of the services
/// that the packages above enable.
const SYSTEMD_UNITS: &[(&str, &str)] = &[
    (
        "guestd.service",
        "[Unit]\nAfter=basic.target\nRequires=basic.target\n\
         [Service]\nExecStart=/usr/sbin/init\nKillMode=process\n",
    ),
    ("guest.target", "[Unit]\nRequires=guestd.service\n"),
];

/// Builds the image unless one of this recipe exists.
pub fn ensure(rebuild: bool) -> Result<()> {
    let image = Image::locate()?;
    fs::create_dir_all(cache_dir()?).context("Create the cache directory")?;
    // Two test runs on a fresh machine must not build it both.
    let lock = fs::File::create(cache_dir()?.join("image.lock")).context("Create image.lock")?;
    let _lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("Lock image.lock")?;
    let recipe = recipe();
    let built = fs::read_to_string(image.dir().join("recipe")).unwrap_or_default();
    if built == recipe && image.root().exists() && !rebuild {
        return Ok(());
    }
    eprintln!(
        "setup: building the guest image in {}",
        image.dir().display()
    );
    let new = cache_dir()?.join("image.new");
    remove(&new)?;
    fs::create_dir_all(&new).context("Create image.new")?;
    build(&new)?;
    fs::write(new.join("recipe"), recipe).context("Write the recipe")?;
    remove(image.dir())?;
    fs::rename(&new, image.dir()).context("Rename image.new")
}

/// Everything that shapes the image, to see whether it is up to date.
fn recipe() -> String {
    format!(
        "{SUITE} {PACKAGES:?} {INITRD_MODULES:?} {EXCLUDED:?} {SIZE} {INIT} {SYSTEMD_UNITS:?} {:?}",
        Kernel::ALL.map(Kernel::package)
    )
}

fn build(dir: &Path) -> Result<()> {
    let root = dir.join("root");
    let sources = dir.join("sources.list");
    fs::write(&sources, apt::debian_sources()?).context("Write sources.list")?;
    let mut mmdebstrap = shell::privileged("mmdebstrap");
    mmdebstrap.args([
        "--quiet",
        "--mode=root",
        "--variant=essential",
        "--format=directory",
    ]);
    mmdebstrap.arg("--aptopt=APT::Install-Recommends \"false\"");
    for option in apt::host_options()? {
        mmdebstrap.arg(format!("--aptopt={option}"));
    }
    for path in EXCLUDED {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    let packages: Vec<_> = PACKAGES
        .iter()
        .copied()
        .chain(Kernel::ALL.map(Kernel::package))
        .collect();
    mmdebstrap.arg(format!("--include={}", packages.join(",")));
    // Packages put links to manual pages there, which are not, and fail if they cannot.
    mmdebstrap.arg("--essential-hook=mkdir -p \"$1/usr/share/man/man1\"");
    // Before the kernels are installed, whose scripts build the initrds.
    mmdebstrap.arg(format!(
        "--essential-hook=mkdir -p \"$1/etc/initramfs-tools/conf.d\" && \
         printf 'MODULES=list\\nCOMPRESS=lz4\\n' >\"$1/etc/initramfs-tools/conf.d/tracker\" && \
         printf '%s\\n' {} >\"$1/etc/initramfs-tools/modules\"",
        INITRD_MODULES.join(" ")
    ));
    shell::run(mmdebstrap.args([Path::new(SUITE), &root, &sources]))?;

    let boot = dir.join("boot");
    shell::run(
        shell::privileged("cp")
            .arg("--recursive")
            .args([root.join("boot"), boot.clone()]),
    )?;
    shell::run(
        shell::privileged("chmod")
            .arg("--recursive")
            .arg("a+rX")
            .arg(&boot),
    )?;
    let init = dir.join("init");
    fs::write(&init, INIT).context("Write init")?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    shell::run(
        shell::privileged("install")
            .arg("--mode=0755")
            .args([init, root.join("usr/sbin/init")]),
    )?;
    for (name, text) in SYSTEMD_UNITS {
        let unit = dir.join(name);
        fs::write(&unit, text).with_context(|| format!("Write {name}"))?;
        let to = root.join("etc/systemd/system").join(name);
        shell::run(
            shell::privileged("install")
                .arg("--mode=0644")
                .args([unit, to]),
        )?;
    }
    shell::run(
        shell::privileged("sh")
            .args([
                "-c",
                "echo tracker-vm >\"$1/etc/hostname\"; : >\"$1/etc/fstab\"",
                "sh",
            ])
            .arg(&root),
    )?;

    let mke2fs = find_program("mke2fs").context("No mke2fs")?;
    let mut mke2fs = shell::privileged(&mke2fs.to_string_lossy());
    mke2fs.args(["-q", "-t", "ext4", "-L", "tracker-root", "-m", "0"]);
    // Nothing may write to the disk by itself while tests measure.
    mke2fs.args(["-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
    shell::run(mke2fs.args([root.clone(), dir.join("root.img")]).arg(SIZE))?;
    shell::run(
        shell::privileged("chmod")
            .arg("0644")
            .arg(dir.join("root.img")),
    )?;
    remove(&root)
}

fn remove(path: &PathBuf) -> Result<()> {
    if path.exists() {
        shell::run(
            shell::privileged("rm")
                .arg("--recursive")
                .arg("--force")
                .arg(path),
        )?;
    }
    Ok(())
}
