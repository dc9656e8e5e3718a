//! Debian packages, from the archives that this machine's apt is configured for.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use vmtests::image::cache_dir;

use crate::shell;

/// Debian release of the guest, and of the machines that `setup` knows.
pub const SUITE: &str = "bookworm";

/// Those of the packages that are not installed.
pub fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let all = packages.iter().copied();
    all.filter(|name| !is_installed(name)).collect()
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// Installs packages of the release.
pub fn install(packages: &[&str]) -> Result<()> {
    eprintln!("setup: installing {packages:?}");
    apt_get(&[], &["update"])?;
    apt_get(&[], &[&INSTALL[..], packages].concat())
}

const INSTALL: [&str; 3] = ["install", "--yes", "--no-install-recommends"];

/// Installs packages of the release's backports, whose index the machine's own apt is not
/// made to fetch.
pub fn install_backports(packages: &[&str]) -> Result<()> {
    let backports = format!("{SUITE}-backports");
    eprintln!("setup: installing {packages:?} from {backports}");
    let dir = cache_dir()?.join("apt");
    fs::create_dir_all(dir.join("lists/partial")).context("Create the cache of apt")?;
    let list = dir.join("sources.list");
    let mut sources = debian_sources()?;
    let main = |line: &&str| line.split(' ').skip(2).eq([SUITE, "main"]);
    let more: String = sources
        .lines()
        .filter(main)
        .map(|line| format!("{line}\n"))
        .collect();
    sources += &more.replace(&format!(" {SUITE} "), &format!(" {backports} "));
    fs::write(&list, sources).with_context(|| format!("Write {}", list.display()))?;
    let lists = dir.join("lists");
    let option = |name: &str, path: &Path| format!("{name}={}", path.display());
    let options = [
        option("Dir::Etc::SourceList", &list),
        option("Dir::Etc::SourceParts", Path::new("/dev/null")),
        option("Dir::State::Lists", &lists),
        // Its own user cannot read everybody's cache directory.
        "APT::Sandbox::User=root".to_owned(),
    ];
    apt_get(&options, &["update"])?;
    let target = ["--target-release", &backports];
    apt_get(&options, &[&INSTALL[..], &target, packages].concat())
}

fn apt_get(options: &[String], words: &[&str]) -> Result<()> {
    let mut command = shell::privileged("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]);
    for option in options {
        command.args(["--option", option]);
    }
    shell::run(command.args(words))
}

/// The Debian archives that this machine's apt is configured for, as a
/// sources.list of the guest's release.
pub fn debian_sources() -> Result<String> {
    let list = || {
        let format = "$(ORIGIN)|$(RELEASE)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)";
        shell::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            format,
            "Identifier: Packages",
        ]))
    };
    let parse = |text: String| -> BTreeSet<String> {
        let line = |line: &str| {
            let mut fields = line.splitn(3, '|');
            let (origin, release, entry) = (fields.next()?, fields.next()?, fields.next()?);
            (origin == "Debian" && release.starts_with(SUITE)).then(|| format!("{entry}\n"))
        };
        text.lines().filter_map(line).collect()
    };
    let mut entries = parse(list()?);
    if entries.is_empty() {
        // apt knows an archive's origin only after it has fetched its index.
        shell::run(shell::privileged("apt-get").args(["update", "-qq"]))?;
        entries = parse(list()?);
    }
    if entries.is_empty() {
        bail!(
            "apt on this machine has no Debian {SUITE} archive configured; add one to its sources"
        );
    }
    Ok(entries.into_iter().collect())
}

/// How this machine's apt reaches its archives: proxies, dates and the like.
pub fn host_options() -> Result<Vec<String>> {
    let dump = shell::output(Command::new("apt-config").arg("dump"))?;
    let wanted = [
        "Acquire::http",
        "Acquire::Check-",
        "Acquire::Retries",
        "Acquire::Max-ValidTime",
    ];
    let option = |line: &&str| {
        wanted.iter().any(|prefix| line.starts_with(prefix)) && !line.contains(" \"\";")
    };
    Ok(dump.lines().filter(option).map(str::to_owned).collect())
}
