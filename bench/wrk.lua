-- Raw image bodies in turn, encoded once. Arguments: path, key, then the files. Prints JSON at the end.
local requests = {}
local place = 0

function init(arguments)
   wrk.headers["Authorization"] = "Bearer " .. arguments[2]
   wrk.headers["Content-Type"] = "application/octet-stream"
   for index = 3, #arguments do
      local file = assert(io.open(arguments[index], "rb"))
      requests[#requests + 1] = wrk.format("POST", arguments[1], nil, file:read("*a"))
      file:close()
   end
end

function request()
   place = place % #requests + 1
   return requests[place]
end

function done(summary, latency, _)
   local errors = summary.errors
   local count = errors.connect + errors.read + errors.write + errors.status + errors.timeout
   io.write(string.format('{"requests": %d, "errors": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f}\n',
      summary.requests, count, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
