import Foundation

/// Bundles on this device, each in a folder of its own below `folder`; whole and checked, or not there.
///
/// What is not finished lies in a folder that begins with a dot, and is taken up again.
public struct Library: Sendable {
    public let folder: URL
    private static let mostBytes = 1 << 40
    /// What is left free for others.
    private static let reserve = 64 << 20

    public init(_ folder: URL) {
        self.folder = folder
    }

    /// Of the bundles that are there.
    public func names() -> [String] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.filter { !$0.hasPrefix(".") && isPlainPath($0) }.sorted()
    }

    public func folder(_ name: String) throws -> URL {
        if !isPlainPath(name) || name.contains("/") { throw MobileMMError("\(shown(name)) is no name for a bundle") }
        return folder.appendingPathComponent(name)
    }

    public func delete(_ name: String) throws {
        let gone = folder.appendingPathComponent(".\(name).deleted")
        do {
            // By renaming first: what is half deleted is no bundle.
            try FileManager.default.moveItem(at: try folder(name), to: gone)
            try FileManager.default.removeItem(at: gone)
        } catch let error as MobileMMError {
            throw error
        } catch {
            throw MobileMMError("\(name): cannot be deleted (\(oneLine(error)))")
        }
    }

    /// Copies a bundle's folder here. Throws ``MobileMMError`` for whatever is no bundle, or damaged; nothing of it is
    /// left then.
    public func add(_ source: URL) throws -> ModelBundle {
        let manifest = try ModelBundle.readManifest(source)
        let name = try free(manifest)
        let draft = folder.appendingPathComponent(".\(name).part")
        do {
            try? FileManager.default.removeItem(at: draft)
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            try FileManager.default.copyItem(at: source, to: draft)
            return try finish(draft, name)
        } catch {
            try? FileManager.default.removeItem(at: draft)
            throw error is MobileMMError ? error : MobileMMError("\(name): cannot be imported (\(oneLine(error)))")
        }
    }

    /// Unpacks the zip file of a bundle's folder, or of what is in it; `progress` hears how many bytes of how many are
    /// there.
    ///
    /// The manifest is read first: only files that it lists, in their sizes, are ever written. Throws ``MobileMMError``
    /// for whatever is no bundle, damaged, or does not fit; nothing of it is left then.
    public func importZip(_ zip: URL, progress: (Int, Int) -> Void = { _, _ in }) throws -> ModelBundle {
        let archive = try ZipArchive(zip)
        defer { archive.close() }
        let files = FileManager.default
        let draft = folder.appendingPathComponent(".\(UUID().uuidString).part")
        do {
            try files.createDirectory(at: draft, withIntermediateDirectories: true)
            let entries = try bundleEntries(archive)
            for name in [ModelBundle.manifestName, ModelBundle.manifestDigestName] {
                guard let entry = entries[name] else { continue }
                if entry.size > ManifestReader.largest { throw MobileMMError("\(zip.path): \(name) is too large") }
                try unpack(archive, entry, to: draft.appendingPathComponent(name)) { _ in }
            }
            let manifest = try ModelBundle.readManifest(draft)
            let total = try checkEntries(zip, entries, manifest)
            let room = try files.attributesOfFileSystem(forPath: folder.path)[.systemFreeSize] as? NSNumber
            if let room, total > room.intValue - Self.reserve {
                throw MobileMMError("\(zip.path): unpacked it has \(total) bytes; there is not enough free space for it")
            }
            var done = 0
            for file in manifest.files {
                try unpack(archive, entries[file.path]!, to: draft.appendingPathComponent(file.path)) {
                    done += $0
                    progress(done, total)
                }
            }
            return try finish(draft, try free(manifest))
        } catch let error as MobileMMError {
            try? files.removeItem(at: draft)
            // Who reads it knows the zip file.
            throw MobileMMError(error.message.replacingOccurrences(of: "\(draft.path)/", with: "\(zip.path): "))
        } catch {
            try? files.removeItem(at: draft)
            throw error is CancellationError
                ? error : MobileMMError("\(zip.path): cannot be imported (\(oneLine(error)))")
        }
    }

    /// A bundle's files by their paths in it, what file managers leave behind apart.
    private func bundleEntries(_ archive: ZipArchive) throws -> [String: ZipArchive.Entry] {
        let place = archive.file.path
        let names = archive.entries.map(\.name)
        // The folder itself may have been packed, or what is in it.
        let manifests = names.filter { $0 == ModelBundle.manifestName || $0.hasSuffix("/\(ModelBundle.manifestName)") }
        guard let first = manifests.min(by: { $0.utf8.count < $1.utf8.count }), first.split(separator: "/").count <= 2
        else { throw MobileMMError("\(place): holds no bundle, because it has no \(ModelBundle.manifestName)") }
        let top = first.dropLast(ModelBundle.manifestName.count)
        var found: [String: ZipArchive.Entry] = [:]
        for entry in archive.entries where !entry.isFolder && !entry.name.hasPrefix("__MACOSX/") {
            let path = entry.name.hasPrefix(top) ? String(entry.name.dropFirst(top.count)) : entry.name
            let isHidden = path.hasPrefix(".") && !path.contains("..") && !path.contains("/")
            if isHidden { continue }
            if !entry.name.hasPrefix(top) || !isPlainPath(path) {
                throw MobileMMError("\(place): holds \(shown(entry.name)), which is no plain path inside a bundle")
            }
            if found.updateValue(entry, forKey: path) != nil {
                throw MobileMMError("\(place): holds \(shown(path)) twice")
            }
        }
        return found
    }

    /// That these are the files that the manifest lists; how many bytes they have.
    private func checkEntries(_ zip: URL, _ entries: [String: ZipArchive.Entry], _ manifest: Manifest) throws -> Int {
        var unlisted = Set(entries.keys).subtracting([ModelBundle.manifestName, ModelBundle.manifestDigestName])
        for file in manifest.files {
            guard let entry = entries[file.path] else { throw MobileMMError("\(zip.path): lacks \(shown(file.path))") }
            if entry.size != file.bytes {
                throw MobileMMError(
                    "\(zip.path): \(shown(file.path)) has \(entry.size) bytes; its manifest says \(file.bytes)")
            }
            unlisted.remove(file.path)
        }
        if let name = unlisted.min() {
            throw MobileMMError("\(zip.path): holds \(shown(name)), which its manifest does not list")
        }
        return try total(manifest, zip.path)
    }

    private func total(_ manifest: Manifest, _ place: String) throws -> Int {
        // A file has less than 2^40 bytes, and there are 10,000 of them at most.
        let total = manifest.files.reduce(0) { $0 + $1.bytes }
        if total > Self.mostBytes { throw MobileMMError("\(place): \(total) bytes are too many") }
        return total
    }

    private func unpack(
        _ archive: ZipArchive, _ entry: ZipArchive.Entry, to file: URL, progress: (Int) -> Void
    ) throws {
        let files = FileManager.default
        try files.createDirectory(at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
        _ = files.createFile(atPath: file.path, contents: nil)
        let handle = try FileHandle(forWritingTo: file)
        defer { try? handle.close() }
        try archive.unpack(entry) { bytes in
            try handle.write(contentsOf: Data(bytes))
            progress(bytes.count)
        }
    }

    /// Fetches the files of a bundle's folder from a server, each checked by its hash; `progress` hears how many bytes
    /// of how many are there.
    ///
    /// What was there already when it broke off is not fetched again. Throws ``MobileMMError`` naming the address.
    public func download(
        _ address: URL, progress: @escaping @Sendable (Int, Int) -> Void = { _, _ in }
    ) async throws -> ModelBundle {
        let key = Sha256.of([UInt8](address.absoluteString.utf8)).prefix(16)
        let draft = folder.appendingPathComponent(".\(key).part")
        let files = FileManager.default
        do {
            try files.createDirectory(at: draft, withIntermediateDirectories: true)
            let loader = Downloader()
            for name in [ModelBundle.manifestName, ModelBundle.manifestDigestName] {
                let place = draft.appendingPathComponent(name)
                try? files.removeItem(at: place)
                try await loader.fetch(
                    address.appendingPathComponent(name), to: place, most: ManifestReader.largest,
                    optional: name == ModelBundle.manifestDigestName)
            }
            let manifest = try ModelBundle.readManifest(draft)
            let total = try total(manifest, "\(address)")
            var done = 0
            for file in manifest.files {
                let (place, before) = (draft.appendingPathComponent(file.path), done)
                try files.createDirectory(at: place.deletingLastPathComponent(), withIntermediateDirectories: true)
                try await loader.fetch(address.appendingPathComponent(file.path), to: place, most: file.bytes) {
                    progress(before + $0, total)
                }
                if try ModelBundle.sha256(draft, file.path) != file.sha256 {
                    try? files.removeItem(at: place)
                    throw MobileMMError("\(address)/\(file.path): its SHA-256 is not what the manifest says; try again")
                }
                done += file.bytes
            }
            return try finish(draft, try free(manifest))
        } catch {
            throw error is MobileMMError || error is CancellationError
                ? error : MobileMMError("\(address): cannot be downloaded (\(oneLine(error)))")
        }
    }

    /// A name that no bundle here has.
    private func free(_ manifest: Manifest) throws -> String {
        let letters = manifest.model.name.map { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-") ? $0 : "-" }
        let stem = "b-\(String(letters))".replacingOccurrences(of: "b--", with: "b-").dropFirst(2)
        let base = stem.isEmpty || stem.hasPrefix("-") ? "bundle" : String(stem)
        let taken = Set(names())
        return ([base] + (2...10_000).map { "\(base)-\($0)" }).first { !taken.contains($0) }!
    }

    private func finish(_ draft: URL, _ name: String) throws -> ModelBundle {
        _ = try ModelBundle.open(draft)
        let place = try folder(name)
        try FileManager.default.moveItem(at: draft, to: place)
        return try ModelBundle.open(place, verify: false)
    }
}
