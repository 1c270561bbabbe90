import Foundation

/// Bundles on this device, each in a folder of its own below `folder`; whole and checked, or not there.
///
/// What is not finished lies in a folder that begins with a dot, and is taken up again.
public struct Library: Sendable {
    public let folder: URL
    private static let mostBytes = 1 << 40

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
            let total = manifest.files.reduce(0) { $0 + $1.bytes }
            if total > Self.mostBytes { throw MobileMMError("\(address): \(total) bytes are too many") }
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
