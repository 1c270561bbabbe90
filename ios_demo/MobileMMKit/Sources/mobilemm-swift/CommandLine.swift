import Foundation
import MobileMMKit

#if canImport(Glibc)
    import Glibc
#elseif canImport(Darwin)
    import Darwin
#endif

private let usage = """
    mobilemm-swift run BUNDLE [--image FILE]… --prompt TEXT [--system TEXT] [--max-new-tokens N]
                       [--temperature X] [--top-p X] [--top-k N] [--seed N] [--threads N] [--out FILE.png]
    mobilemm-swift verify BUNDLE [--threads N]
    mobilemm-swift bench BUNDLE [--threads N] [--out FILE.json]

    Chats with a bundle, checks it against its golden vectors, or measures it: bundles for onnx on Linux, for coreml on macOS.
    What the model draws goes to --out (drawing.png); a file that is there is kept, and a number added.
    """

/// What was typed wrongly.
private struct Usage: Error {
    let message: String
}

@main
struct CommandLineRunner {
    static func main() async {
        do {
            try await run(Array(CommandLine.arguments.dropFirst()))
        } catch let error as Usage {
            tell("error: \(error.message)\n\(usage)")
            exit(2)
        } catch {
            tell("error: \(oneLine(error))")
            exit(1)
        }
    }

    private static func run(_ arguments: [String]) async throws {
        guard let command = arguments.first else { throw Usage(message: "a command is missing") }
        if ["-h", "--help", "help"].contains(command) { return print(usage) }
        let options = try Options(Array(arguments.dropFirst()))
        switch command {
        case "run": try await chat(options)
        case "verify": try await verify(options)
        case "bench": try await bench(options)
        default: throw Usage(message: "there is no command \(shown(command))")
        }
    }

    private static func chat(_ options: Options) async throws {
        guard let prompt = options.text["--prompt"]?.last else { throw Usage(message: "--prompt is missing") }
        var sampling = Sampling()
        if let value = try options.number("--max-new-tokens") { sampling.maxNewTokens = Int(value) }
        if let value = try options.number("--temperature") { sampling.temperature = value }
        if let value = try options.number("--top-p") { sampling.topP = value }
        if let value = try options.number("--top-k") { sampling.topK = Int(value) }
        if let value = try options.number("--seed") { sampling.seed = UInt64(value) }
        let bundle = try ModelBundle.open(options.bundle)
        let backend = try await openBackend(bundle, threads: try options.threads)
        let session = try await Session(bundle, backend, sampling: sampling, system: options.text["--system"]?.last)
        for image in options.text["--image"] ?? [] {
            try await session.lookAt(try PictureFile.read(URL(fileURLWithPath: image)))
        }
        for try await piece in session.stream(prompt) {
            switch piece {
            case .text(let text): print(text, terminator: "")
            case .drawing(let drawing):
                let file = free(URL(fileURLWithPath: options.text["--out"]?.last ?? "drawing.png"))
                try PictureFile.write(drawing.picture, to: file)
                print("[\(file.path), seed \(drawing.seed)]", terminator: "")
            case .sketch: break
            }
            fflush(nil)
        }
        print()
        guard let stats = await session.stats else { return }
        let (read, written) = (stats.promptTokens - stats.cachedTokens, stats.newTokens)
        tell(
            String(
                format: "%@: read %ld tokens (%.1f/s), wrote %ld (%.1f/s), first token after %.2f s", backend.runtime,
                read, stats.prefillRate, written, stats.decodeRate, stats.ttft))
    }

    private static func free(_ file: URL) -> URL {
        var (found, number) = (file, 2)
        while FileManager.default.fileExists(atPath: found.path) {
            let name = "\(file.deletingPathExtension().lastPathComponent)-\(number).\(file.pathExtension)"
            found = file.deletingLastPathComponent().appendingPathComponent(name)
            number += 1
        }
        return found
    }

    private static func verify(_ options: Options) async throws {
        let bundle = try ModelBundle.open(options.bundle)
        print("files: \(bundle.manifest.files.count) as the manifest says, hashes included")
        let backend = try await openBackend(bundle, threads: try options.threads)
        let checks = try await SelfCheck(bundle, backend).run { check in
            print("\(check.part): \(check.passed ? "ok" : "FAILED"), \(check.text)")
        }
        if checks.contains(where: { !$0.passed }) {
            throw MobileMMError("\(bundle.folder.path): does not compute what it computed when it was made")
        }
    }

    private static func bench(_ options: Options) async throws {
        let bundle = try ModelBundle.open(options.bundle)
        var settings = BenchmarkSettings()
        settings.threads = try options.threads
        let backend = try await openBackend(bundle, threads: settings.threads)
        let figures = try await Benchmark(bundle, backend, settings).run { tell($0) }
        for figure in figures { print(String(format: "%@: %.4g %@ (%@)", figure.name, figure.median, figure.unit, figure.what)) }
        guard let path = options.text["--out"]?.last else { return }
        let result = try BenchmarkResult(
            bundle, figures, settings, device: ProcessInfo.processInfo.hostName, runtime: backend.runtime)
        do {
            try result.json().write(to: URL(fileURLWithPath: path))
        } catch {
            throw MobileMMError("\(path): cannot be written (\(oneLine(error)))")
        }
    }

    private static func tell(_ line: String) { FileHandle.standardError.write(Data("\(line)\n".utf8)) }
}

private struct Options {
    private static let known = [
        "--image", "--prompt", "--system", "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed", "--threads",
        "--out",
    ]

    let bundle: URL
    private(set) var text: [String: [String]] = [:]

    init(_ arguments: [String]) throws {
        var bundle: String?
        var rest = arguments[...]
        while let word = rest.popFirst() {
            if !word.hasPrefix("--") {
                if bundle != nil { throw Usage(message: "\(shown(word)) is one folder too many") }
                bundle = word
                continue
            }
            guard Self.known.contains(word) else { throw Usage(message: "there is no option \(shown(word))") }
            guard let value = rest.popFirst() else { throw Usage(message: "\(word) needs a value") }
            text[word, default: []].append(value)
        }
        guard let bundle else { throw Usage(message: "the bundle's folder is missing") }
        self.bundle = URL(fileURLWithPath: bundle)
    }

    func number(_ name: String) throws -> Double? {
        guard let text = text[name]?.last else { return nil }
        guard let value = Double(text), value >= 0, value <= 1e15 else {
            throw Usage(message: "\(name) must be a number from 0 on, not \(shown(text))")
        }
        return value
    }

    var threads: Int { get throws { Int(try number("--threads") ?? 0) } }
}
