//! The image format: what is written is read back, and nothing else is accepted.

mod sample;

use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use tracker::image::{
    DirectoryStore, Header, Image, RangeStore, Store, StoreError, decode, decode_one, encode,
};

/// One application with an object in every record kind.
fn sample() -> Image {
    let dir = tempfile::tempdir().unwrap();
    let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
    sample::everything(&store)
}

#[test]
fn what_is_written_is_read_back() {
    let image = sample();
    assert_eq!(decode(&encode(&image)).unwrap(), image);
    assert_eq!(
        decode(&encode(&Image::default())).unwrap(),
        Image::default()
    );
}

#[test]
fn one_application_is_read_without_the_others() {
    let image = sample();
    let bytes = encode(&image);
    assert!(image.applications.len() > 1);
    for (index, application) in image.applications.iter().enumerate() {
        let found = decode_one(&bytes, index).unwrap();
        assert_eq!(found.applications, std::slice::from_ref(application));
        assert_eq!((&found.system, &found.slots), (&image.system, &image.slots));
    }
    let none = decode_one(&bytes, image.applications.len()).unwrap();
    assert_eq!(none.applications, []);
    assert!(decode_one(&bytes[..bytes.len() - 1], 0).is_err());
}

#[test]
fn another_architecture_and_a_newer_format_are_named() {
    for (at, expected) in [(8, "architecture"), (12, "format version"), (16, "flags")] {
        let mut bytes = encode(&sample());
        bytes[at] = 0xb7;
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        let error = decode(&bytes).unwrap_err();
        assert!(error.reason.contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_decode_nor_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let framed = [&Header::current().to_bytes()[..], &bytes].concat();
        prop_assert!(decode(&framed).is_err());
        prop_assert!(decode(&bytes).is_err());
    }
}

fn pages(fill: u8, count: usize) -> Vec<u8> {
    vec![fill; count * 4096]
}

#[test]
fn a_directory_image_exists_once_committed_and_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut store = DirectoryStore::create(&path).unwrap();
    store.write_pages(3, &pages(3, 2)).unwrap();
    assert!(matches!(store.metadata(), Err(StoreError::NotSealed(..))));
    store.commit(b"metadata", 5).unwrap();
    assert!(matches!(
        DirectoryStore::create(&path),
        Err(StoreError::Exists(_))
    ));

    let store = DirectoryStore::open(&path).unwrap();
    let mut read = pages(0, 2);
    store.read_pages(3, &mut read).unwrap();
    assert_eq!(read, pages(3, 2));
    assert_eq!(store.metadata().unwrap(), b"metadata");
}

#[test]
fn only_the_caller_may_read_a_directory_image() {
    // What it would be without modes of its own.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut store = DirectoryStore::create(&path).unwrap();
    store.commit(b"metadata", 0).unwrap();
    let check = |path: &std::path::Path, mode: u32| {
        let found = path.symlink_metadata().unwrap();
        assert_eq!(found.permissions().mode() & 0o7777, mode, "{path:?}");
        assert_eq!(found.uid(), nix::unistd::geteuid().as_raw(), "{path:?}");
    };
    check(&path, 0o700);
    check(&path.join("pages"), 0o600);
    check(&path.join("metadata"), 0o600);
}

#[test]
fn an_image_that_exists_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut store = DirectoryStore::create(&path).unwrap();
    store.write_pages(0, &pages(1, 1)).unwrap();
    store.commit(b"first", 1).unwrap();
    for taken in [&path, &path.join("pages"), &path.join("metadata")] {
        assert!(matches!(
            DirectoryStore::create(taken),
            Err(StoreError::Exists(_))
        ));
    }
    // An empty directory is somebody's too.
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert!(matches!(
        DirectoryStore::create(&empty),
        Err(StoreError::Exists(_))
    ));
    assert_eq!(fs::read(path.join("metadata")).unwrap(), b"first");
    assert_eq!(fs::read(path.join("pages")).unwrap(), pages(1, 1));
}

#[test]
fn no_symbolic_link_is_followed_in_writing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("victim")).unwrap();
    fs::write(at("file"), b"kept").unwrap();
    // In the image's own place.
    for (name, to) in [
        ("dangling", "nowhere"),
        ("directory", "victim"),
        ("link", "file"),
    ] {
        symlink(at(to), at(name)).unwrap();
        assert!(matches!(
            DirectoryStore::create(&at(name)),
            Err(StoreError::Exists(_))
        ));
    }
    // In the place of the file that the metadata is written to.
    let mut store = DirectoryStore::create(&at("image")).unwrap();
    symlink(at("file"), at("image/metadata.part")).unwrap();
    assert!(matches!(
        store.commit(b"metadata", 0),
        Err(StoreError::Io { .. })
    ));
    store.discard();
    // In the place of the metadata: the link is replaced.
    let mut store = DirectoryStore::create(&at("image")).unwrap();
    symlink(at("file"), at("image/metadata")).unwrap();
    store.commit(b"metadata", 0).unwrap();
    assert!(at("image/metadata").symlink_metadata().unwrap().is_file());
    // In the place of the directory, once it is open.
    let mut store = DirectoryStore::create(&at("other")).unwrap();
    fs::rename(at("other"), at("moved")).unwrap();
    symlink(at("victim"), at("other")).unwrap();
    store.commit(b"metadata", 0).unwrap();
    assert!(at("moved/metadata").exists());

    assert_eq!(fs::read(at("file")).unwrap(), b"kept");
    assert_eq!(fs::read_dir(at("victim")).unwrap().count(), 0);
    assert!(!at("nowhere").exists());
}

#[test]
fn no_symbolic_link_is_followed_inside_of_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut store = DirectoryStore::create(&path).unwrap();
    store.commit(b"metadata", 0).unwrap();
    for name in ["metadata", "pages"] {
        fs::rename(path.join(name), dir.path().join(name)).unwrap();
        symlink(dir.path().join(name), path.join(name)).unwrap();
        let read = DirectoryStore::open(&path).and_then(|store| store.metadata());
        assert!(
            matches!(read, Err(StoreError::Io { .. })),
            "{name}: {read:?}"
        );
        fs::remove_file(path.join(name)).unwrap();
        fs::rename(dir.path().join(name), path.join(name)).unwrap();
    }
}

#[test]
fn an_unsealed_directory_image_can_be_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    DirectoryStore::create(&path).unwrap().discard();
    assert!(!path.exists());
}

#[test]
fn a_range_holds_an_image_from_commit_to_erase() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("range");
    std::fs::write(&path, vec![0x5a; 64 * 4096]).unwrap();
    assert!(matches!(
        RangeStore::open(&path).unwrap().metadata(),
        Err(StoreError::NotSealed(..))
    ));

    let mut store = RangeStore::create(&path).unwrap();
    store.write_pages(1, &pages(7, 1)).unwrap();
    assert!(matches!(store.metadata(), Err(StoreError::NotSealed(..))));
    store.commit(b"metadata", 2).unwrap();

    let store = RangeStore::open(&path).unwrap();
    assert_eq!(store.metadata().unwrap(), b"metadata");
    let mut read = pages(0, 1);
    store.read_pages(1, &mut read).unwrap();
    assert_eq!(read, pages(7, 1));
    let slot = usize::try_from(store.first_slot() + 4096).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[slot..slot + 4096], pages(7, 1));

    store.erase().unwrap();
    assert!(matches!(store.metadata(), Err(StoreError::NotSealed(..))));
}

#[test]
fn a_range_that_is_too_small_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("range");
    std::fs::write(&path, vec![0; 4 * 4096]).unwrap();
    let mut store = RangeStore::create(&path).unwrap();
    assert!(matches!(
        store.write_pages(3, &pages(1, 1)),
        Err(StoreError::Full { .. })
    ));
    assert!(matches!(
        store.commit(&pages(1, 2), 2),
        Err(StoreError::Full { .. })
    ));
}
